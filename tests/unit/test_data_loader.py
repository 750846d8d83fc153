"""Tokenised once, packed without leaking, and dealt so that every sample is seen once an epoch."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from qdora.config import (
    AdapterConfig,
    AdapterMethod,
    DataConfig,
    DataFormat,
    Dtype,
    ModelConfig,
    Overlong,
    ParallelConfig,
    Plan,
    QuantConfig,
    QuantMethod,
)
from qdora.data import Batch, BatchLoader, TokenDataset, dataset, prepare
from qdora.data.loader import pack
from qdora.errors import DataError
from qdora.model import load_model
from qdora.model.loss import batch_loss
from qdora.parallel import start_alone
from tests.support.models import FAMILIES, make_model, make_tokenizer

LOSS_TOLERANCE = 1e-5
"""Relative; float32 sums over rows of other lengths."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """23 samples of different lengths, each told by its first character."""
    rows = [{"prompt": chr(65 + n) + "?" * (n % 4), "completion": "x" * (3 + 5 * (n % 7))} for n in range(23)]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """A cache of its own."""
    return DataConfig(max_length=64, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def data(source: Path, config: DataConfig) -> TokenDataset:
    """The samples, tokenised by characters."""
    return prepare(config, str(source), make_tokenizer())


def loader(data: TokenDataset, **options: Any) -> BatchLoader:
    """A loader of one rank unless told otherwise."""
    defaults = {
        "micro_batch_size": 2,
        "num_accumulation_steps": 2,
        "max_length": 64,
        "packing": True,
        "rank": 0,
        "world_size": 1,
        "seed": 0,
    }
    return BatchLoader(data, **{**defaults, **options})


def samples_of(batches: list[Batch]) -> list[str]:
    """The samples of some micro-batches, each as its text, in order."""
    tokenizer = make_tokenizer()
    found = []
    for batch in batches:
        for ids, positions, labels in zip(batch.input_ids, batch.position_ids, batch.labels, strict=True):
            starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
            for first, last in pairwise(starts):
                if (labels[first:last] != -100).any():
                    found.append(tokenizer.decode(ids[first:last]).replace(" ", "").partition("</s>")[0])
    return found


def all_samples(data: TokenDataset) -> Counter[str]:
    """Every sample as its text."""
    tokenizer = make_tokenizer()
    texts = (tokenizer.decode(data[index][0]).replace(" ", "").removesuffix("</s>") for index in range(len(data)))
    return Counter(texts)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_sample_is_seen_once_an_epoch_over_all_ranks(data: TokenDataset, packing: bool, world_size: int) -> None:
    seen: Counter[str] = Counter()
    for rank in range(world_size):
        one = loader(data, packing=packing, rank=rank, world_size=world_size)
        seen.update(sample for step in one.epoch() for sample in samples_of(step))
    assert seen == all_samples(data)


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_have_equally_many_micro_batches_in_every_step(data: TokenDataset, packing: bool) -> None:
    steps = [
        [len(step) for step in loader(data, packing=packing, rank=rank, world_size=3).epoch()] for rank in range(3)
    ]
    assert steps[0] == steps[1] == steps[2]


def test_data_smaller_than_the_ranks_gives_empty_micro_batches(data: TokenDataset) -> None:
    steps = [list(loader(data, packing=True, rank=rank, world_size=30).epoch()) for rank in range(30)]
    assert {len(step) for step in steps} == {1}
    assert steps[29][0][0].num_label_tokens == 0
    assert steps[29][0][0].input_ids.shape == (1, 2)
    assert sum((Counter(samples_of(step[0])) for step in steps), Counter()) == all_samples(data)


@pytest.mark.parametrize("packing", [True, False])
def test_rows_of_a_step_do_not_depend_on_the_ranks(data: TokenDataset, packing: bool) -> None:
    alone = loader(data, packing=packing, num_accumulation_steps=4)
    pair = [loader(data, packing=packing, rank=rank, world_size=2) for rank in range(2)]
    both = zip(*(one.epoch() for one in pair), strict=True)
    for step, halves in zip(alone.epoch(), both, strict=True):
        assert Counter(samples_of(step)) == Counter(samples_of(halves[0] + halves[1]))


def test_order_changes_with_epoch_and_seed_only(data: TokenDataset) -> None:
    def order(one: BatchLoader) -> list[str]:
        return [sample for step in one.epoch() for sample in samples_of(step)]

    first = loader(data, packing=False)
    epoch_0, epoch_1 = order(first), order(first)
    assert epoch_0 != epoch_1
    assert order(loader(data, packing=False)) == epoch_0
    assert order(loader(data, packing=False, seed=1)) != epoch_0
    assert order(loader(data, packing=False, shuffle=False)) == [*all_samples(data)]


@pytest.mark.parametrize("worlds", [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("packing", [True, False])
def test_state_resumes_exactly_on_any_number_of_ranks(
    data: TokenDataset, packing: bool, worlds: tuple[int, int]
) -> None:
    before, after = worlds
    whole = [samples_of(step) for step in islice(loader(data, packing=packing, num_accumulation_steps=2), 9)]
    ranks = [
        loader(data, packing=packing, num_accumulation_steps=2 // before, rank=rank, world_size=before)
        for rank in range(before)
    ]
    for one in ranks:
        for _ in islice(one, 5):
            pass
    resumed = []
    for rank in range(after):
        one = loader(data, packing=packing, num_accumulation_steps=2 // after, rank=rank, world_size=after)
        one.load_state_dict(ranks[0].state_dict())
        resumed.append([samples_of(step) for step in islice(one, 4)])
    for index, expected in enumerate(whole[5:9]):
        assert Counter(sample for rank in resumed for sample in rank[index]) == Counter(expected)


def test_packed_rows_are_full_and_not_too_long(data: TokenDataset) -> None:
    one = loader(data, packing=True)
    rows = [row for step in one.epoch() for batch in step for row in batch.input_ids]
    assert max(len(row) for row in rows) <= 64
    assert one.packing_efficiency > 0.9
    assert one.num_rows < len(data)


def test_pack_places_every_sample_once_in_few_rows() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 5000)
    rows = pack(lengths, np.random.default_rng(1).permutation(5000), 1024)
    assert sorted(index for row in rows for index in row) == list(range(5000))
    assert max(lengths[row].sum() for row in rows) <= 1024
    assert len(rows) <= 1.02 * lengths.sum() / 1024 + 1


def test_positions_restart_and_no_label_crosses_samples(data: TokenDataset) -> None:
    batch = next(iter(loader(data, packing=True)))[0]
    starts = (batch.position_ids[:, 1:] == 0).nonzero()
    assert len(starts)
    for row, column in starts.tolist():
        assert batch.labels[row, column] == -100  # the last token of the sample before


def test_labels_are_the_next_tokens(data: TokenDataset) -> None:
    batch = next(iter(loader(data, packing=True)))[0]
    learned = batch.labels[:, :-1] != -100
    assert torch.equal(batch.labels[:, :-1][learned], batch.input_ids[:, 1:][learned])
    assert batch.num_label_tokens == int((batch.labels != -100).sum())


def test_padding_is_masked_by_place_and_the_end_is_learned(smollm2: Path, tmp_path: Path) -> None:
    """The real model's pad token is its end-of-turn token."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    file = tmp_path / "data.jsonl"
    rows = [{"instruction": "Hi", "output": "Yes." * (1 + 5 * n)} for n in range(2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepare(DataConfig(cache_dir=str(tmp_path / "cache")), str(file), tokenizer)
    one = loader(data, packing=False, shuffle=False, pad_token_id=tokenizer.pad_token_id)
    batch = next(iter(one))[0]
    ends = (batch.labels == tokenizer.pad_token_id).sum(1)
    assert ends.tolist() == [1, 1]
    assert int((batch.input_ids[0] == tokenizer.pad_token_id).sum()) > 5


@pytest.mark.parametrize("packing", [True, False])
def test_batch_names_its_samples_in_order(data: TokenDataset, packing: bool) -> None:
    tokenizer = make_tokenizer()
    steps = list(loader(data, packing=packing, rank=1, world_size=2).epoch())
    assert any(len(batch.samples) > len(batch.input_ids) for step in steps for batch in step) is packing
    for batch in (batch for step in steps for batch in step):
        texts = [tokenizer.decode(data[index][0]).replace(" ", "").removesuffix("</s>") for index in batch.samples]
        assert samples_of([batch]) == texts


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_padded_rows_have_the_loss_of_single_samples(
    family: str, data: TokenDataset, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model", family, dtype=torch.float32)
    model = load_model(
        folder,
        ModelConfig(path=str(folder), dtype=Dtype.float32),
        QuantConfig(method=QuantMethod.none),
        AdapterConfig(method=AdapterMethod.none),
        ParallelConfig(plan=Plan.none),
        start_alone("test"),
        trainable=False,
    ).model

    @torch.no_grad()
    def total(**options: Any) -> float:
        steps = loader(data, **options).epoch()
        losses: list[Tensor] = [batch_loss(model, batch, torch.device("cpu")) for step in steps for batch in step]
        return float(sum(losses))

    single = total(packing=False, micro_batch_size=1)
    assert total(packing=True) == pytest.approx(single, rel=LOSS_TOLERANCE)
    assert total(packing=False, micro_batch_size=5) == pytest.approx(single, rel=LOSS_TOLERANCE)


def _count_encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    encode = dataset.encode

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return encode(*arguments)

    monkeypatch.setattr(dataset, "encode", counted)
    return calls


def test_cache_is_used_the_second_time(source: Path, config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _count_encodings(monkeypatch)
    first = prepare(config, str(source), make_tokenizer())
    assert len(calls) == 23
    second = prepare(config, str(source), make_tokenizer())
    assert len(calls) == 23
    assert (second.fingerprint, len(second)) == (first.fingerprint, len(first))
    assert all(torch.equal(a, b) for a, b in zip(first[3], second[3], strict=True))


@pytest.mark.parametrize("change", ["content", "format", "max_length", "limit", "overlong", "template", "vocabulary"])
def test_cache_is_left_when_the_result_would_differ(
    source: Path, config: DataConfig, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    tokenizer = make_tokenizer()
    source.write_text(source.read_text().replace('"prompt"', '"text": "of another format", "prompt"'))
    prepare(config, str(source), tokenizer)
    calls = _count_encodings(monkeypatch)
    if change == "content":
        source.write_text(source.read_text().replace("x", "y"))
    elif change == "vocabulary":
        assert tokenizer.add_tokens("xxx")
    elif change == "template":
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
    else:
        value = {"format": DataFormat.text, "max_length": 32, "limit": 20, "overlong": Overlong.drop}[change]
        config = replace(config, **{change: value})
    prepare(config, str(source), tokenizer)
    assert calls


def test_long_samples_are_truncated_and_counted(source: Path, config: DataConfig) -> None:
    data = prepare(replace(config, max_length=20), str(source), make_tokenizer())
    assert data.lengths.max() == 20
    assert data.report.num_truncated == sum(1 for n in range(23) if 2 + n % 4 + 3 + 5 * (n % 7) > 20)
    assert "truncated" in data.report.describe()


def test_long_samples_are_dropped_and_counted(source: Path, config: DataConfig) -> None:
    data = prepare(replace(config, max_length=20, overlong=Overlong.drop), str(source), make_tokenizer())
    too_long = sum(1 for n in range(23) if 2 + n % 4 + 3 + 5 * (n % 7) > 20)
    assert (data.report.num_dropped_overlong, data.report.num_truncated) == (too_long, 0)
    assert len(data) == 23 - too_long
    assert data.lengths.max() <= 20


@pytest.mark.parametrize("size", [5, 64, 65, 127, 128, 500])
def test_long_text_is_cut_into_samples_each_token_of_which_is_learned_once(
    tmp_path: Path, config: DataConfig, size: int
) -> None:
    text = "".join(chr(97 + index % 26) for index in range(size))
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"text": text}) + "\n")
    tokenizer = make_tokenizer()
    whole = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    for overlong in (Overlong.auto, Overlong.split):
        data = prepare(replace(config, overlong=overlong), str(file), tokenizer)
        learned = [int(label) for index in range(len(data)) for label in data[index][1] if label >= 0]
        assert learned == whole[1:]
        assert data.lengths.max() <= config.max_length
        assert (data.report.num_split, data.report.num_truncated) == (int(len(whole) > config.max_length), 0)
        assert all(data.where(index) == f"{file} line 1" for index in range(len(data)))
    cut = prepare(replace(config, overlong=Overlong.truncate), str(file), tokenizer)
    assert cut.lengths.tolist() == [min(len(whole), config.max_length)]


def test_question_is_not_split(tmp_path: Path, config: DataConfig) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completion": "b" * 90}) + "\n")
    with pytest.raises(DataError, match=r"data\.overlong=split cuts texts"):
        prepare(replace(config, overlong=Overlong.split), str(file), make_tokenizer())


def test_sample_whose_answer_was_cut_off_is_dropped_and_counted(tmp_path: Path, config: DataConfig) -> None:
    file = tmp_path / "data.jsonl"
    rows = [{"prompt": "a" * 90, "completion": "b"}, {"prompt": "a", "completion": "b"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepare(config, str(file), make_tokenizer())
    assert (len(data), data.report.num_dropped_without_labels) == (1, 1)


def test_data_with_nothing_to_learn_is_told(tmp_path: Path, config: DataConfig) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"prompt": "a" * 90, "completion": "b"}) + "\n")
    with pytest.raises(DataError, match=r"none of its 1 rows has a token left to learn within data.max_length=64"):
        prepare(config, str(file), make_tokenizer())


def test_empty_data_is_told_and_leaves_no_cache(tmp_path: Path, config: DataConfig) -> None:
    (tmp_path / "data.jsonl").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        prepare(config, str(tmp_path / "data.jsonl"), make_tokenizer())
    assert not list(Path(str(config.cache_dir)).iterdir())


def test_sample_tells_its_place_whatever_was_dropped_before_it(tmp_path: Path, config: DataConfig) -> None:
    """Line 2 is empty, line 3 too long; row 2 of the other file has its answer cut off."""
    rows = [json.dumps({"prompt": "a" * length, "completion": "b"}) for length in (1, 90, 2, 3)]
    (tmp_path / "data").mkdir()
    first, second = tmp_path / "data" / "a.jsonl", tmp_path / "data" / "b c.json"
    first.write_text("\n".join([rows[0], "", *rows[1:]]) + "\n")
    second.write_text(f"[{rows[2]}, {rows[1]}, {rows[3]}]")
    places = [f"{first} line 1", f"{first} line 4", f"{first} line 5", f"{second} row 1", f"{second} row 3"]
    for overlong in (Overlong.auto, Overlong.truncate, Overlong.drop):
        for _ in ("made", "read again"):
            data = prepare(replace(config, overlong=overlong), str(tmp_path / "data"), make_tokenizer())
            assert [data.where(index) for index in range(len(data))] == places
            assert data.lengths.tolist() == [3, 4, 5, 4, 5]


def test_renamed_file_gives_its_new_place(tmp_path: Path, source: Path, config: DataConfig) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    before = source.rename(folder / "before.jsonl")
    prepare(config, str(folder), make_tokenizer())
    after = before.rename(folder / "after.jsonl")
    assert prepare(config, str(folder), make_tokenizer()).where(22) == f"{after} line 23"
