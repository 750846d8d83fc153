"""The words that options take, as YAML and the command line spell them."""

from enum import Enum


class Dtype(Enum):
    bfloat16 = "bfloat16"
    float32 = "float32"


class Attention(Enum):
    auto = "auto"
    sdpa = "sdpa"
    varlen = "varlen"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"
    flex_attention = "flex_attention"

    @property
    def untrained(self) -> "Attention":
        """That of a model which is not trained: `varlen` knows no cache and no padding."""
        return Attention.sdpa if self in (Attention.auto, Attention.varlen) else self


class QuantMethod(Enum):
    nf4 = "nf4"
    none = "none"


class AdapterMethod(Enum):
    dora = "dora"
    lora = "lora"
    vera = "vera"
    dvora = "dvora"
    none = "none"

    @property
    def has_magnitude(self) -> bool:
        return self in (AdapterMethod.dora, AdapterMethod.dvora)

    @property
    def is_vera(self) -> bool:
        """Whether all layers share a frozen A and B."""
        return self in (AdapterMethod.vera, AdapterMethod.dvora)


class DataFormat(Enum):
    auto = "auto"
    messages = "messages"
    instruction = "instruction"
    completion = "completion"
    text = "text"


ROW_KEYS = {
    DataFormat.messages: {
        *("messages", "conversations", "prompt", "completion", "tools", "functions", "system", "chat_template_kwargs")
    },
    DataFormat.instruction: {"instruction", "input", "output", "system", "history", "chat_template_kwargs"},
    DataFormat.completion: {"prompt", "completion"},
    DataFormat.text: {"text"},
}
"""Keys of a row that each format reads."""
NEEDED_KEYS = (
    (frozenset({"messages"}), DataFormat.messages),
    (frozenset({"conversations"}), DataFormat.messages),
    (frozenset({"instruction", "output"}), DataFormat.instruction),
    (frozenset({"prompt", "completion"}), DataFormat.completion),
    (frozenset({"text"}), DataFormat.text),
)
"""Keys that a row of each format must have; of several formats whose keys a row has, the first is taken."""
TURN_KEYS = {"role", "content"}
"""Keys of a turn that `data.columns` can map, beside those of a row."""
ROLE_WORDS = {"user", "assistant", "tool"}
"""Roles whose word in the turns `data.columns` can say; `system` is a column of a row."""
ASKED_KEYS = {"answer", "choices"}
"""Keys of a row that evaluation reads, whatever its format."""


class Overlong(Enum):
    auto = "auto"
    split = "split"
    truncate = "truncate"
    drop = "drop"


class SampleBy(Enum):
    document = "document"
    paragraph = "paragraph"
    line = "line"


class Reasoning(Enum):
    keep = "keep"
    drop = "drop"


class UnknownKeys(Enum):
    error = "error"
    warn = "warn"


class Schedule(Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class OnBadStep(Enum):
    stop = "stop"
    skip = "skip"


class Plan(Enum):
    auto = "auto"
    fsdp = "fsdp"
    hsdp = "hsdp"
    ddp = "ddp"
    none = "none"


class ActivationCheckpointing(Enum):
    auto = "auto"
    none = "none"
    selective = "selective"
    full = "full"


class OnExceed(Enum):
    refuse = "refuse"
    warn = "warn"
    off = "off"


class Gather(Enum):
    ahead = "ahead"
    block = "block"
    part = "part"


class TrackerKind(Enum):
    wandb = "wandb"
    none = "none"


class TrackerMode(Enum):
    auto = "auto"
    online = "online"
    offline = "offline"


class Protocol(Enum):
    loss = "loss"
    likelihood = "likelihood"
    generate = "generate"
    harness = "harness"


class MergeBase(Enum):
    nf4 = "nf4"
    original = "original"
    auto = "auto"


class MergedDtype(Enum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class MergeFormat(Enum):
    hf = "hf"
    nf4 = "nf4"
    gguf = "gguf"
    lora = "lora"


class GgufType(Enum):
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


class Compare(Enum):
    base = "base"


class Report(Enum):
    table = "table"
    json = "json"


class Pick(Enum):
    first = "first"
    random = "random"
    longest = "longest"
    shortest = "shortest"
