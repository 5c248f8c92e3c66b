"""Data in every form, and streams of batches that are functions of seed and epoch."""

import itertools
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from orderppl.errors import UserError
from orderppl.inference.batches import BatchStream, as_batch
from orderppl.unmasking import Batch


def ragged(rows: int = 23, length: int = 9) -> Batch:
    """Rows that begin with their number, the first of 4 columns given in some, padding on both sides."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, length + 1, (rows,), generator=generator)
    mask = torch.arange(length) < sizes[:, None]
    tokens = torch.where(mask, torch.arange(rows)[:, None] + 1, 0)
    prompts = torch.arange(4) >= torch.randint(0, 4, (rows, 1), generator=generator)
    given = torch.cat([prompts, torch.zeros_like(mask)], 1)
    return Batch(torch.cat([prompts * 7, tokens], 1), torch.cat([prompts, mask], 1), given)


def rows_of(batch: Batch) -> list[int]:
    return [int(row[mask].max()) - 1 for row, mask in zip(batch.tokens, batch.latent, strict=True)]


def take(stream: BatchStream, count: int) -> list[list[int]]:
    return [rows_of(batch) for batch in itertools.islice(stream, count)]


@pytest.mark.parametrize("group", [1, 3])
def test_every_epoch_visits_every_row_once_in_a_new_order(group: int) -> None:
    stream = BatchStream(ragged(), 4, seed=5, group=group)
    epochs = [take(stream, stream.batches_per_epoch) for _ in range(3)]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(23))
        assert sorted(len(rows) for rows in epoch) == [3, 4, 4, 4, 4, 4]
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_depends_on_the_seed_and_not_on_the_global_state() -> None:
    first = take(BatchStream(ragged(), 4, seed=5), 8)
    torch.manual_seed(99)
    assert first == take(BatchStream(ragged(), 4, seed=5), 8)
    assert first != take(BatchStream(ragged(), 4, seed=6), 8)


@pytest.mark.parametrize("stop", [0, 3, 6, 11])
def test_continues_where_it_stopped(stop: int) -> None:
    expected = take(BatchStream(ragged(), 4, seed=2, group=2), 20)
    stopped = BatchStream(ragged(), 4, seed=2, group=2)
    take(stopped, stop)
    resumed = BatchStream(ragged(), 4, seed=2, group=2)
    resumed.load_state_dict(stopped.state_dict())
    assert take(resumed, 20 - stop) == expected[stop:]


def test_batches_have_no_column_that_is_padding_in_all_rows_and_know_their_prefix() -> None:
    data = ragged()
    widths = set()
    stream = BatchStream(data, 4, seed=0)
    for _ in range(6):
        (piece,) = stream.pieces()
        batch, rows = piece.batch, data.rows(piece.keys.rows)
        kept = rows.attention_mask.any(0)
        assert batch.attention_mask.any(0).all()
        assert torch.equal(batch.tokens, rows.tokens[:, kept])
        assert torch.equal(batch.attention_mask, rows.attention_mask[:, kept])
        assert torch.equal(batch.latent, rows.latent[:, kept])
        assert "prefix" in batch.__dict__  # found on the host
        assert not batch.latent[:, : batch.prefix].any() and batch.latent[:, batch.prefix].any()
        widths.add((batch.prefix, batch.tokens.shape[1]))
    assert len(widths) > 1


def test_grouping_saves_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(40) < torch.randint(1, 41, (400, 1), generator=generator)

    def padding(group: int) -> int:
        stream = BatchStream(Batch(mask.long(), mask), 10, seed=0, group=group)
        return sum(int((~batch.attention_mask).sum()) for batch in itertools.islice(stream, 40))

    assert padding(20) < padding(1) / 5


def test_drops_the_short_batch_on_request_and_reads_once_in_order() -> None:
    stream = BatchStream(ragged(), 4, seed=0, drop_last=True)
    assert [len(rows) for rows in take(stream, 10)] == [4] * 10
    assert [len(rows) for rows in take(BatchStream(ragged(), 40, drop_last=True), 3)] == [23] * 3  # the only one
    ordered = BatchStream(ragged(), 4)
    before = ordered.state_dict()
    assert list(itertools.chain(*(rows_of(piece.batch) for piece in ordered.once()))) == list(range(23))
    assert list(itertools.chain(*(piece.keys.rows.tolist() for piece in ordered.once()))) == list(range(23))
    assert ordered.state_dict() == before


@pytest.mark.parametrize(
    ("data", "options", "field"),
    [
        ({}, {}, "batch"),
        ({"tokens": torch.zeros(0, 3, dtype=torch.long)}, {}, "data"),
        ([], {}, "data"),
        (5, {}, "data"),
        ("tokens", {}, "data"),
        ({"tokens": torch.zeros(3, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3)}, {}, "attention_mask"),
        ({"tokens": torch.zeros(3, 3, dtype=torch.long), "attn_mask": torch.zeros(3, 3)}, {}, "batch"),
        ({"tokens": [[1, 2], ["a"]]}, {}, "tokens"),
        (torch.zeros(3, 3, dtype=torch.long), {"batch_size": 0}, "batch_size"),
        (torch.zeros(3, 3, dtype=torch.long), {"seed": -1}, "seed"),
        (torch.zeros(3, 3, dtype=torch.long), {"group": 0}, "group"),
    ],
)
def test_refuses_bad_input(data: Any, options: dict[str, int], field: str) -> None:
    with pytest.raises(UserError) as caught:
        BatchStream(data, **{"batch_size": 2, **options})
    assert caught.value.field == field


def test_refuses_the_position_of_another_stream() -> None:
    stream = BatchStream(ragged(), 4, seed=0)
    with pytest.raises(UserError, match="batch_size: the checkpoint was written with 4, this run has 5"):
        BatchStream(ragged(), 5, seed=0).load_state_dict(stream.state_dict())
    other = ragged()
    other.tokens[3, 6] += 1
    with pytest.raises(UserError, match="data: the checkpoint was written with .*; resume with the settings and data"):
        BatchStream(other, 4, seed=0).load_state_dict(stream.state_dict())


@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("pieces", [1, 2])
def test_processes_share_every_batch_row_by_row(processes: int, pieces: int) -> None:
    whole = BatchStream(ragged(), 4, seed=3, group=2)  # 23 rows: the short batch has 3
    shares = [BatchStream(ragged(), 4, seed=3, group=2) for _ in range(processes)]
    for _ in range(9):
        (piece,) = whole.pieces()
        rows = rows_of(piece.batch)
        assert piece.keys.rows.tolist() == rows
        assert piece.share == 1
        seen: list[int] = []
        total = 0.0
        for process, share in enumerate(shares):
            for part in share.pieces(pieces, process, processes):
                mine = rows_of(part.batch)
                assert part.keys.rows.tolist() == rows
                assert part.keys.rows[part.keys.mine].tolist() == mine
                assert part.keys.epoch == whole.epoch
                assert part.share == len(mine) / len(rows) or (part.share == 0 and mine == rows[:1])
                seen += mine if part.share else []
                total += part.share
        assert sorted(seen) == sorted(rows)
        assert total == pytest.approx(1)
    assert shares[-1].state_dict() == whole.state_dict()


def test_pieces_weigh_by_their_tokens_where_the_loss_is_a_mean_over_them() -> None:
    data = ragged()
    stream = BatchStream(data, 4, seed=3, per_token=True)
    for _ in range(6):
        pieces = list(stream.pieces(3))
        sizes = [int(piece.batch.latent.sum()) if piece.share else 0 for piece in pieces]
        assert [piece.share for piece in pieces] == [size / sum(sizes) for size in sizes]


def test_positions_are_known_by_their_rank_among_those_to_reveal() -> None:
    (piece,) = BatchStream(ragged(), 5, seed=1).pieces()
    assert piece.keys.places is not None
    for places, latent in zip(piece.keys.places, piece.batch.latent, strict=True):
        assert places[latent].tolist() == list(range(int(latent.sum())))


def test_the_digest_tells_data_apart() -> None:
    tokens, mask, given = ragged().tokens, ragged().attention_mask, ragged().given
    assert given is not None
    first = BatchStream(ragged(), 4).digest
    assert first == BatchStream(ragged(), 5).digest
    others = [Batch(tokens + 1, mask, given), Batch(tokens, mask), Batch(tokens, mask, given & False), Batch(tokens)]
    assert len({first, *(BatchStream(other, 4).digest for other in others)}) == 5


def same(one: Batch, other: Batch) -> bool:
    """The same sequences, whatever stands at padding."""
    return (
        torch.equal(one.attention_mask, other.attention_mask)
        and torch.equal(one.latent, other.latent)
        and torch.equal(one.readable, other.readable)
    )


def columns(batch: Batch) -> dict[str, Any]:
    assert batch.given is not None
    return {"tokens": batch.tokens, "attention_mask": batch.attention_mask, "given": batch.given}


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, batch: Batch) -> None:
        self.batch_of_all = batch

    def __len__(self) -> int:
        return len(self.batch_of_all)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in columns(self.batch_of_all).items()}


def test_takes_data_in_every_form() -> None:
    batch = ragged()
    parts = [batch.rows(slice(start, start + 5)).trimmed() for start in range(0, 23, 5)]
    lists = {name: column.tolist() for name, column in columns(batch).items()}
    forms: dict[str, Any] = {
        "batch": batch,
        "dict": columns(batch),
        "lists": lists,
        "examples": SimpleNamespace(batch=batch, texts=[]),
        "datasets": datasets.Dataset.from_dict(lists),
        "torch dataset": datasets.Dataset.from_dict(lists).with_format("torch"),
        "loader": DataLoader(Rows(batch), batch_size=5),
        "shuffling loader": DataLoader(Rows(batch), batch_size=5, shuffle=True),  # the stream shuffles
        "generator": (columns(batch.rows(slice(start, start + 5))) for start in range(0, 23, 5)),
        "tuples": DataLoader(TensorDataset(*columns(batch).values()), batch_size=5),
    }
    for form, data in forms.items():
        assert same(as_batch(data), batch), form
    # parts of other widths: padded on the right
    joined = as_batch(parts)
    for start, part in zip(range(0, 23, 5), parts, strict=True):
        assert same(joined.rows(slice(start, start + 5)).trimmed(), part)
    assert same(as_batch(batch.tokens), Batch(batch.tokens))
    assert same(as_batch(batch.tokens.numpy()), Batch(batch.tokens))
    assert same(as_batch(DataLoader(TensorDataset(batch.tokens), batch_size=7)), Batch(batch.tokens))


def test_rows_of_different_lengths_are_padded_on_the_right() -> None:
    found = as_batch({"input_ids": [[5, 6, 7], [8], [9, 9]]})
    assert found.attention_mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    assert found.readable.tolist() == [[5, 6, 7], [8, 0, 0], [9, 9, 0]]
    found = as_batch(datasets.Dataset.from_dict({"tokens": [[5, 6], [8]], "given": [[True, False], [True]]}))
    assert found.latent.tolist() == [[False, True], [False, False]]


def test_a_loader_that_picks_rows_keeps_its_pick() -> None:
    batch = ragged()
    loader = DataLoader(Rows(batch), batch_size=2, sampler=SubsetRandomSampler([3, 8, 11]))
    assert sorted(rows_of(as_batch(loader))) == [3, 8, 11]
