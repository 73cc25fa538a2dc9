"""Rows of a batch in streams: everything is there once, in order, and hardly anything else."""

import itertools

import numpy as np
import pytest

from jaxrl_sd import packing
from jaxrl_sd.packing import NO_SEGMENT, Prompts, Size, Sizes
from jaxrl_sd.types import Batch, Hints, Rollouts
from jaxrl_sd.vocabulary import STUDENT

PAD = 99
P, G, S, T = 5, 3, 7, 6


def left_pad(rows, width):
    out = np.full((len(rows), width), PAD, np.int32)
    for row, ids in zip(out, rows, strict=True):
        row[width - len(ids) :] = ids
    return out


def draw(seed: int, P: int = P, lengths=None, shared: bool = False):
    """A batch of P groups, and the ids of every row's prompts and responses."""
    rng = np.random.default_rng(seed)
    B = P * G
    lengths = rng.integers(0, T + 1, size=B) if lengths is None else lengths

    def prompts(num, times):
        # A number of its own begins each, so that no two are equal.
        drawn = [[1000 + p, *rng.integers(9, size=rng.integers(S - 1))] for p in range(num)]
        return [drawn[i // times] for i in range(B)]

    student, teacher = prompts(P, G), prompts(P, G) if shared else prompts(B, 1)
    responses = [rng.integers(10, 20, size=n).tolist() for n in lengths]
    mask_t = (np.arange(T) < np.array(lengths)[:, None]).astype(np.float32)
    response = np.full((B, T), PAD, np.int32)
    for row, ids in zip(response, responses, strict=True):
        row[: len(ids)] = ids
    ones = np.ones(B, np.float32)

    def lengths_of(rows):
        return np.array([len(ids) for ids in rows], np.int32)

    rollouts = Rollouts(
        left_pad(student, S), lengths_of(student), response, *[mask_t] * 3, *[ones] * 3, G
    )
    hints = {"teacher": Hints(left_pad(teacher, S + 1), lengths_of(teacher), ones)}
    return Batch(rollouts, hints), {STUDENT: student, "teacher": teacher}, responses


def sizes_of(student=64, teacher=96, prefix=64, rows=8) -> Sizes:
    return Sizes({STUDENT: Size(student, prefix), "teacher": Size(teacher, 96)}, student, rows)


def seen_by(stream, r: int, place: int) -> list[int]:
    """Tokens that the token at a place sees, as attention is told: prefix, then its own segment."""
    own = stream.segment[r, place]
    prefix = stream.token[r, stream.prefix[r, stream.prefix_segment[r] == own]]
    before = np.arange(stream.token.shape[1]) <= place
    return [*prefix.tolist(), *stream.token[r, before & (stream.segment[r] == own)].tolist()]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("streams", [1, 3])
def test_every_token_is_predicted_from_all_before_it(seed, streams):
    batch, prompts, responses = draw(seed)
    parts = packing.pack(batch, sizes_of(), streams, range(P * G))
    found = np.zeros((P * G, T), int)
    for part in parts:
        for r in range(streams):
            for m in range(part.count[r]):
                row, t = part.rows[r, part.row[r, m]], part.t[r, m]
                found[row, t] += 1
                assert part.token[r, m] == responses[row][t]
                for name, stream in part.streams.items():
                    want = prompts[name][row] + responses[row][:t]
                    place = stream.predictor[r, m]
                    assert seen_by(stream, r, place) == want
                    assert stream.position[r, place] == len(want) - 1
    np.testing.assert_array_equal(found, batch.rollouts.mask_t)


def test_a_teacher_reads_no_row_for_which_it_has_no_prompt():
    batch, prompts, responses = draw(6, lengths=[T] * P * G)
    hints, silent = batch.hints["teacher"], np.arange(P * G) % 4 == 1
    hints = hints.replace(prompt_length=np.where(silent, 0, hints.prompt_length))
    parts = packing.pack(batch.replace(hints={"teacher": hints}), sizes_of(), 2, range(P * G))
    rows = np.concatenate([part.rows[part.rows < P * G] for part in parts])
    assert sorted(rows) == list(range(P * G))
    for part in parts:
        stream = part.streams["teacher"]
        for r, m in zip(*np.nonzero(part.token), strict=True):
            row, t = part.rows[r, part.row[r, m]], part.t[r, m]
            place = stream.predictor[r, m]
            assert (place == stream.token.shape[1]) == silent[row]
            if not silent[row]:
                assert seen_by(stream, r, place) == prompts["teacher"][row] + responses[row][:t]
    read = [row for row in range(P * G) if not silent[row]]
    tokens = sum(len(prompts["teacher"][row]) + len(responses[row]) - 1 for row in read)
    assert sum(part.streams["teacher"].count.sum() for part in parts) == tokens


def test_rows_that_a_teacher_does_not_read_are_not_gathered():
    """They share no prompt; where one goes says nothing about the others."""
    prompts, length, rows = rows_of([100, 95, 60], range(3))
    prompts |= {"teacher": [np.zeros(10, np.int32).tobytes(), b"", b""]}
    sizes = Sizes({STUDENT: Size(200, 40), "teacher": Size(128, 128)}, 200, 8)
    bins, used = packing.assign(prompts, length, sizes, rows)
    assert bins == [[0, 2], [1]]
    np.testing.assert_array_equal(used[:, 2:4], [[109, 10], [0, 0]])


def test_what_attention_asks_of_segments():
    batch, *_ = draw(0)
    for part in packing.pack(batch, sizes_of(), 2, range(P * G)):
        for stream in part.streams.values():
            assert (np.diff(stream.segment) >= 0).all()
            assert (np.diff(stream.prefix_segment) >= 0).all()
            for segment, prefix, count in zip(
                stream.segment, stream.prefix_segment, stream.count, strict=True
            ):
                padding = segment[count:]
                assert len(set(padding)) == len(padding)
                assert not set(padding) & set(segment[:count])
                assert not set(prefix) & set(padding)
                assert prefix.max() <= NO_SEGMENT


def test_a_prompt_is_in_a_stream_once():
    batch, prompts, responses = draw(1, lengths=[T] * P * G, shared=True)
    (part,) = packing.pack(batch, sizes_of(256, 256, 256, rows=P * G), 1, range(P * G))
    inputs = sum(len(ids) - 1 for ids in responses)
    for name, stream in part.streams.items():
        own = sum(len(ids) for ids in prompts[name][::G])
        assert stream.count[0] == own + inputs


def test_only_the_rows_that_are_asked_for():
    batch, *_ = draw(2, lengths=[3] * P * G)
    parts = packing.pack(batch, sizes_of(), 1, range(4, 9))
    rows = np.concatenate([part.rows.ravel() for part in parts])
    assert sorted(rows[rows < P * G]) == list(range(4, 9))


@pytest.mark.parametrize("streams", [1, 4])
def test_there_is_a_part_even_of_nothing(streams):
    batch, *_ = draw(0, lengths=[0] * P * G)
    (part,) = packing.pack(batch, sizes_of(), streams, range(P * G))
    assert part.rows.shape == (streams, 8) and (part.rows == P * G).all()
    assert not part.count.any()


@pytest.mark.parametrize(
    "sizes",
    [sizes_of(student=8), sizes_of(teacher=8), sizes_of(prefix=3)],
    ids=["student", "teacher", "prefix"],
)
def test_a_row_that_does_not_fit_is_an_error(sizes):
    batch, *_ = draw(0, lengths=[T] * P * G)
    with pytest.raises(ValueError, match=r"row .*: needs"):
        packing.pack(batch, sizes, 1, range(P * G))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tokens", [2048, 4096, 16384])
def test_sizes_hold_the_longest_row_and_whole_groups(tokens, shared):
    prompts = {STUDENT: Prompts(1024, True), "teacher": Prompts(5000, shared)}
    sizes = packing.sizes(prompts, 8, 1024, tokens)
    for name, (longest, _) in prompts.items():
        assert sizes.streams[name].tokens >= longest + 1024
        assert sizes.streams[name].prefix >= longest
        assert sizes.streams[name].tokens % packing.TILE == 0
    student, teacher = (sizes.streams[name].tokens for name in prompts)
    assert tokens <= student < tokens + packing.TILE
    want = ((5000 if shared else 8 * 5000) + 8 * 1024) / (1024 + 8 * 1024) * tokens
    assert teacher == pytest.approx(max(want, 6024), abs=packing.TILE)


@pytest.mark.parametrize("name", [STUDENT, "teacher"])
def test_padding_is_what_is_not_computed_for_anybody(name):
    batch, *_ = draw(3)
    parts = packing.pack(batch, sizes_of(), 2, range(P * G))
    streams = [part.streams[name] for part in parts]
    used = sum(s.count.sum() for s in streams)
    assert packing.padding(parts, name) == pytest.approx(
        1 - used / sum(s.token.size for s in streams)
    )


def rows_of(lengths, owner):
    """Prompts of 10 tokens, of which those of one owner are equal, for `packing.spread`."""
    prompts = [np.full(10, p, np.int32).tobytes() for p in owner]
    return {STUDENT: prompts}, np.array(lengths), range(len(lengths))


def test_streams_are_filled_alike():
    """8 rows fit into a stream, so 10 take two, which then have 5 each and need less room."""
    prompts, length, rows = rows_of([1000] * 10, range(10))
    sizes = Sizes({STUDENT: Size(8192, 4096)}, 8192, 10)
    bins, narrow = packing.spread(prompts, length, sizes, 2, rows)
    assert sorted(map(len, bins)) == [5, 5] and sorted(itertools.chain(*bins)) == [*rows]
    assert narrow == Sizes({STUDENT: Size(5120, 2560)}, 5120, 10)
    alone, wide = packing.spread(prompts, length, sizes, 1, rows)
    assert (len(alone), wide) == (2, narrow)


def test_streams_do_not_become_more():
    """Rows of 3000 go in pairs into three streams, which cannot be as short as the mean."""
    prompts, length, rows = rows_of([3000] * 5, range(5))
    sizes = Sizes({STUDENT: Size(8192, 4096)}, 8192, 10)
    bins, narrow = packing.spread(prompts, length, sizes, 1, rows)
    assert sorted(map(len, bins)) == [1, 2, 2] and narrow.streams[STUDENT].tokens == 6144


def test_a_model_is_narrowed_whatever_the_others_need():
    prompts, length, rows = rows_of([1000] * 10, range(10))
    prompts |= {"teacher": [np.full(3000, i, np.int32).tobytes() for i in range(10)]}
    sizes = Sizes({STUDENT: Size(8192, 4096), "teacher": Size(24576, 24576)}, 8192, 10)
    _, narrow = packing.spread(prompts, length, sizes, 2, rows)
    assert [size.tokens for size in narrow.streams.values()] == [5120, 21504]


def test_a_stream_is_as_wide_as_its_longest_row():
    prompts, length, rows = rows_of([6000] + [100] * 3, range(4))
    sizes = Sizes({STUDENT: Size(8192, 4096)}, 8192, 8)
    bins, narrow = packing.spread(prompts, length, sizes, 4, rows)
    assert sorted(map(len, bins), reverse=True)[-1] == 0 and narrow.streams[STUDENT].tokens == 6144


def test_a_teacher_gets_the_room_that_it_needs():
    prompts, length, rows = rows_of([500] * 8, [0] * 8)
    prompts |= {"teacher": [np.zeros(1000, np.int32).tobytes()] * 8}
    sizes = Sizes({STUDENT: Size(4096, 4096), "teacher": Size(16384, 32768)}, 4096, 8)
    bins, narrow = packing.spread(prompts, length, sizes, 1, rows)
    assert len(bins) == 1
    assert narrow.streams == {STUDENT: Size(4096, 4096), "teacher": Size(5120, 10240)}


def test_short_streams_keep_their_shape():
    prompts, length, rows = rows_of([20] * 5, range(5))
    sizes = Sizes({STUDENT: Size(256, 128)}, 256, 64)
    assert packing.spread(prompts, length, sizes, 4, rows)[1] == sizes


@pytest.mark.parametrize("streams", [1, 32])
@pytest.mark.parametrize("seed", range(3))
def test_long_tails_leave_little_padding(seed, streams):
    """Log-normal lengths with a mean of 30% of what may be; at most 10% of the tokens pad."""
    rng = np.random.default_rng(seed)
    length = np.clip(rng.lognormal(np.log(1000), 0.6, 64 * 8), 20, 4096).astype(int)
    prompts = [np.full(rng.integers(60, 400), p, np.int32).tobytes() for p in range(64)]
    prompts = {STUDENT: [prompts[b // 8] for b in range(64 * 8)]}
    sizes = packing.sizes({STUDENT: Prompts(1024, True)}, 8, 4096, 3 * 5120)
    bins, sizes = packing.spread(prompts, length, sizes, streams, range(64 * 8))
    necessary = (length - 1).sum() + sum(len(x) // 4 for x in prompts[STUDENT][::8])
    assert sorted(itertools.chain(*bins)) == list(range(64 * 8))
    assert necessary > 0.9 * len(bins) * sizes.streams[STUDENT].tokens
