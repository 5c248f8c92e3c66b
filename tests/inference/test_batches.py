import itertools

import pytest
import torch

from orderppl.errors import UserError
from orderppl.inference.batches import BatchStream


def ragged(rows: int = 23, length: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, length + 1, (rows,), generator=generator)
    mask = torch.arange(length) < sizes[:, None]
    tokens = torch.where(mask, torch.arange(rows)[:, None] + 1, 0)
    context_mask = torch.arange(4) < torch.randint(1, 5, (rows, 1), generator=generator)
    return {"tokens": tokens, "attention_mask": mask, "context": context_mask * 7, "context_mask": context_mask}


def rows_of(batch: dict[str, torch.Tensor]) -> list[int]:
    return (batch["tokens"][:, 0] - 1).tolist()


@pytest.mark.parametrize("group", [1, 3])
def test_every_epoch_visits_every_row_once_in_a_new_order(group: int) -> None:
    stream = BatchStream(ragged(), 4, seed=5, group=group)
    epochs = [[rows_of(batch) for batch in itertools.islice(stream, stream.batches_per_epoch)] for _ in range(3)]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(23))
        assert sorted(len(rows) for rows in epoch) == [3, 4, 4, 4, 4, 4]
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_depends_on_the_seed_and_not_on_the_global_state() -> None:
    first = list(itertools.islice(BatchStream(ragged(), 4, seed=5), 8))
    torch.manual_seed(99)
    again = list(itertools.islice(BatchStream(ragged(), 4, seed=5), 8))
    other = list(itertools.islice(BatchStream(ragged(), 4, seed=6), 8))
    assert [rows_of(b) for b in first] == [rows_of(b) for b in again]
    assert [rows_of(b) for b in first] != [rows_of(b) for b in other]


@pytest.mark.parametrize("stop", [0, 3, 6, 11])
def test_continues_where_it_stopped(stop: int) -> None:
    whole = BatchStream(ragged(), 4, seed=2, group=2)
    expected = [rows_of(batch) for batch in itertools.islice(whole, 20)]
    stopped = BatchStream(ragged(), 4, seed=2, group=2)
    for _ in range(stop):
        next(stopped)
    resumed = BatchStream(ragged(), 4, seed=2, group=2)
    resumed.load_state_dict(stopped.state_dict())
    assert [rows_of(batch) for batch in itertools.islice(resumed, 20 - stop)] == expected[stop:]


def test_trims_columns_that_are_padding_in_the_whole_batch() -> None:
    tensors = ragged()
    for batch in itertools.islice(BatchStream(tensors, 4, seed=0), 6):
        rows = torch.tensor(rows_of(batch))
        assert batch["attention_mask"].any(0).all()
        assert batch["context_mask"].any(0).all()
        assert batch["tokens"].shape == batch["attention_mask"].shape
        assert (batch["tokens"] == tensors["tokens"][rows, : batch["tokens"].shape[1]]).all()
        assert not tensors["attention_mask"][rows, batch["tokens"].shape[1] :].any()
    untrimmed = next(BatchStream(tensors, 2, seed=0, trim=False))
    assert untrimmed["tokens"].shape[1] == 9


def test_left_padding_is_not_cut() -> None:
    mask = torch.tensor([[False, False, True], [False, True, True]])
    batch = next(BatchStream({"context": mask.long(), "context_mask": mask, "tokens": torch.ones(2, 4)}, 2))
    assert batch["context_mask"].shape == (2, 3)


def test_grouping_saves_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(40) < torch.randint(1, 41, (400, 1), generator=generator)
    tensors = {"tokens": mask.long(), "attention_mask": mask}

    def padding(group: int) -> int:
        stream = BatchStream(tensors, 10, seed=0, group=group)
        return sum(int((~batch["attention_mask"]).sum()) for batch in itertools.islice(stream, 40))

    assert padding(20) < padding(1) / 5


def test_drops_the_short_batch_on_request_and_reads_in_order_without_shuffling() -> None:
    stream = BatchStream(ragged(), 4, seed=0, drop_last=True)
    assert [len(rows_of(batch)) for batch in itertools.islice(stream, 10)] == [4] * 10
    ordered = BatchStream(ragged(), 4, shuffle=False)
    assert list(itertools.chain(*(rows_of(b) for b in itertools.islice(ordered, 6)))) == list(range(23))
    before = ordered.state_dict()
    assert list(itertools.chain(*(rows_of(b) for b in ordered.once()))) == list(range(23))
    assert ordered.state_dict() == before


@pytest.mark.parametrize(
    ("tensors", "options", "field"),
    [
        ({}, {}, "tensors"),
        ({"tokens": torch.zeros(0, 3)}, {}, "tensors"),
        ({"tokens": torch.zeros(3, 3), "attention_mask": torch.zeros(2, 3)}, {}, "tensors"),
        ({"tokens": torch.zeros(3, 3)}, {"batch_size": 0}, "batch_size"),
        ({"tokens": torch.zeros(3, 3)}, {"batch_size": 4, "drop_last": True}, "batch_size"),
        ({"tokens": torch.zeros(3, 3)}, {"seed": -1}, "seed"),
        ({"tokens": torch.zeros(3, 3)}, {"group": 0}, "group"),
    ],
)
def test_refuses_bad_input(tensors: dict[str, torch.Tensor], options: dict[str, int], field: str) -> None:
    with pytest.raises(UserError) as caught:
        BatchStream(tensors, **{"batch_size": 2, **options})
    assert caught.value.field == field


def test_refuses_the_position_of_another_stream() -> None:
    stream = BatchStream(ragged(), 4, seed=0)
    with pytest.raises(UserError, match="batch_size: the checkpoint was written with 4, this run has 5"):
        BatchStream(ragged(), 5, seed=0).load_state_dict(stream.state_dict())


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_processes_share_every_batch_row_by_row(processes: int) -> None:
    whole = BatchStream(ragged(), 4, seed=3, group=2)  # 23 rows: the short batch has 3
    shares = [BatchStream(ragged(), 4, seed=3, group=2) for _ in range(processes)]
    for process, share in enumerate(shares):
        share.share(process, processes)
    for _ in range(9):
        rows = rows_of(next(whole))
        assert whole.keys.rows.tolist() == rows
        assert whole.weight == 1
        seen: list[int] = []
        for share in shares:
            mine = rows_of(next(share))
            assert share.keys.rows.tolist() == rows
            assert share.keys.rows[share.keys.mine].tolist() == mine
            assert share.keys.epoch == whole.epoch
            assert share.weight == 1 or mine == rows[:1]
            seen += mine * share.weight
        assert sorted(seen) == sorted(rows)
    assert shares[-1].state_dict() == whole.state_dict()


def test_the_checksum_tells_data_and_batches_apart() -> None:
    first = BatchStream(ragged(), 4)
    assert first.checksum() == BatchStream(ragged(), 4).checksum()
    changed = ragged()
    changed["tokens"][3, 0] += 1
    assert len({s.checksum() for s in (first, BatchStream(ragged(), 5), BatchStream(changed, 4))}) == 3
    with pytest.raises(UserError, match="stream: no batch has been drawn yet"):
        _ = first.keys
