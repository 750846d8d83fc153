"""AdamW over the float32 master shards, the course of the learning rate, and gradient clipping."""

import math

import torch
from torch import Tensor, nn

from qdora.config import OptimConfig, Schedule
from qdora.parallel import World, summed
from qdora.sharding import own_rows, reshard


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over the trainable parameters; weight decay on matrices only."""
    reshard(model)  # a gathered parameter is a temporary tensor: updates of it would be lost
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,  # few launches, no temporaries, and no step count that the host would read
    )


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """The learning rate of update `step` (0 to num_steps - 1): linear warm-up, then the schedule towards 0."""
    warmup = round(config.warmup_ratio * num_steps) if config.warmup_steps is None else config.warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, num_steps - warmup)
    factor = {
        Schedule.constant: 1.0,
        Schedule.linear: 1.0 - progress,
        Schedule.cosine: 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.schedule]
    return config.learning_rate * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def clip_gradients(model: nn.Module, max_norm: float, world: World, *values: float | Tensor) -> Tensor:
    """Scales the gradients down to a global L2 norm of `max_norm` (0: not at all). *Collective*.

    Args:
        values: numbers, and scalars of the device, that are summed over the ranks on this occasion.

    Returns:
        (values + 1,) float64 on the device, which is not waited for: these sums, and the norm before, in the precision
        of float32. That is not finite if any gradient is not.
    """
    gradients = [own_rows(parameter.grad)[0] for parameter in model.parameters() if parameter.grad is not None]
    totals = summed(world, *values, nn.utils.get_total_norm(gradients).square())
    # Under hsdp and ddp several ranks have the same share of the gradients.
    norm = totals[-1].mul_(world.num_shards / world.size).sqrt_().float()
    totals[-1].copy_(norm)
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / (norm.to(gradients[0].device) + 1e-6)).clamp(max=1.0))
    return totals


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that training changes, by name: trainable parameters and AdamW's moments and step counts.

    Moments that do not exist before the first update are created as zeros, so that a checkpoint can be read into them.
    """
    reshard(model)
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors[f"model.{name}"] = parameter.detach()
        tensors |= {f"optimizer.{name}.{kind}": value for kind, value in state.items()}
    return tensors
