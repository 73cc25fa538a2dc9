"""Packs the rows of a batch into streams of tokens, so that hardly any computed token is padding.

A micro-batch is one stream on each device, filled with whole rows: each prompt once, however many
responses to it there are, and the responses back to back. How many micro-batches an update has
follows from its lengths. They have one shape, out of a few, for which everything is compiled once.
Student and teachers read the same rows, each after its own prompts; a row for which a teacher has
no prompt takes no room in its stream. Host code, on numpy arrays.

B rows, N tokens of a stream, C prefix keys, M response tokens, W rows of a stream, R streams,
K prompts of a stream, each once.
"""

import itertools
import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxrl_sd.types import Batch, Hints, Part, Rollouts, Stream
from jaxrl_sd.vocabulary import STUDENT

TILE = 128  # what kernels on accelerators work in: sizes of streams are multiples of it
NO_SEGMENT = 2**30
SHAPES = 16  # of a stream to choose from
STEP = 256  # tokens: a shape that is less smaller does not pay for being compiled


class Prompts(NamedTuple):
    """What is known of a model's prompts before there are any."""

    longest: int  # S, in tokens
    shared: bool  # whether all rows of a group have the same


class Size(NamedTuple):
    """What a model's stream has room for."""

    tokens: int  # N
    prefix: int  # C


class Sizes(NamedTuple):
    """What the streams of a micro-batch have room for."""

    streams: Mapping[str, Size]  # by model
    responses: int  # M, in tokens
    rows: int  # W

    def room(self) -> np.ndarray:
        """All numbers, (N, C) of each model, then M and W: what a row needs some of."""
        return np.array([x for size in self.streams.values() for x in size] + [*self[1:]])

    def of(self, room: np.ndarray) -> "Sizes":
        """Other numbers for the same models."""
        *pairs, responses, rows = room.tolist()
        streams = {n: Size(*pairs[2 * i : 2 * i + 2]) for i, n in enumerate(self.streams)}
        return Sizes(streams, responses, rows)


def sizes(prompts: Mapping[str, Prompts], group_size: int, max_response: int, tokens: int) -> Sizes:
    """Room in every model's stream for what `tokens` hold in the student's.

    That is as many groups as fit if prompts and responses are as long as they may be. A teacher
    that reads another prompt for each row has to read more.

    Args:
      prompts: of every model, the student's under `STUDENT`.
      tokens: N of the student's stream, at least; a row of full length always fits.

    >>> sizes({STUDENT: Prompts(128, shared=True)}, group_size=8, max_response=480, tokens=3968)
    Sizes(streams={'': Size(tokens=3968, prefix=2048)}, responses=3968, rows=64)
    """
    G, T = group_size, max_response
    groups = tokens / (prompts[STUDENT].longest + G * T)

    def of(S: int, shared: bool) -> Size:
        room = groups * ((S if shared else G * S) + G * T)
        # Twice the keys of full groups: more groups fit when responses are short.
        return Size(_round_up(max(room, S + T)), _round_up(max(2 * groups * G * S, S)))

    streams = {name: of(*prompt) for name, prompt in prompts.items()}
    return Sizes(streams, streams[STUDENT].tokens, max(round(8 * groups * G), 1))


def _round_up(x: float) -> int:
    return -(-round(x) // TILE) * TILE


def pack(batch: Batch, sizes: Sizes, num_streams: int, rows: Sequence[int]) -> list[Part]:
    """Micro-batches of some rows of a batch, at least one.

    They are as few as `sizes` allows, and then as small as that leaves them.

    Args:
      batch: rollouts and hints, on the host. Rows of which no token trains are left out.
      sizes: what a stream may have room for.
      num_streams: R, a stream for each device that has rows of its own.
      rows: of the batch.

    Raises:
      ValueError: a row does not fit.
    """
    r = batch.rollouts
    length = _lengths(r.mask_t)
    prompts = {STUDENT: _read(r), **{name: _read(hints) for name, hints in batch.hints.items()}}
    chosen = [row for row in rows if length[row]]
    bins, sizes = spread(prompts, length, sizes, num_streams, chosen)
    streams = [_pack_stream(rows, prompts, r.response, length, sizes) for rows in bins]
    return [
        jax.tree.map(lambda *x: np.stack(x), *streams[i : i + num_streams])
        for i in range(0, len(streams), num_streams)
    ]


def spread(
    prompts: Mapping[str, Sequence[bytes]],
    length: np.ndarray,
    sizes: Sizes,
    num_streams: int,
    rows: Sequence[int],
) -> tuple[list[list[int]], Sizes]:
    """The rows of each stream, of which there is a multiple of `num_streams`, and their sizes.

    Args:
      prompts, length, rows: as `assign` takes them.
      sizes: the largest.

    Raises:
      ValueError: as `assign`.
    """
    bins, used = assign(prompts, length, sizes, rows)
    if not bins:
        return [[]] * num_streams, sizes
    num, ladder = -(-len(bins) // num_streams) * num_streams, _Ladder(sizes)
    level = ladder.lowest(used.max(axis=0))
    # With the least room for which there are no more streams, all are filled alike.
    for i, even in enumerate(ladder.lowest(used.sum(axis=0) // num)):
        for lower in range(even, level[i], -1):
            smaller = ladder.sizes(np.where(np.arange(len(level)) == i, lower, level))
            try:
                evenly = assign(prompts, length, smaller, rows)
            except ValueError:  # the longest row does not fit
                continue
            if len(evenly[0]) <= num:
                bins, used = evenly
                level = ladder.lowest(used.max(axis=0))
                break
    return bins + [[]] * (num - len(bins)), ladder.sizes(level)


class _Ladder:
    """The shapes that a micro-batch may have: each model's sizes, so many steps below the largest.

    Prefix keys follow tokens, and so do responses and rows the student's.
    """

    def __init__(self, largest: Sizes):
        self.largest, self.room = largest, largest.room()
        self.model = np.arange(len(self.room)) // 2  # whose number it is
        self.model[-2:] = [*largest.streams].index(STUDENT)
        tokens = self.room[2 * self.model]
        step = np.maximum(-(-tokens // SHAPES // TILE) * TILE, STEP)
        self.step = self.room * step // tokens // TILE * TILE

    def sizes(self, level: np.ndarray) -> Sizes:
        """Those of a level of each model, 0 for the largest."""
        return self.largest.of(self.room - level[self.model] * self.step)

    def lowest(self, used: np.ndarray) -> np.ndarray:
        """The level of each model that has just the room for that."""
        steps = np.maximum(self.step, 1)
        spare = np.where(self.step > 0, (self.room - np.maximum(used, 1)) // steps, SHAPES)
        return np.array([spare[self.model == i].min() for i in range(self.model.max() + 1)])


def _lengths(mask_t: np.ndarray) -> np.ndarray:
    """Tokens up to the last that trains."""
    trained = np.asarray(mask_t) != 0
    return np.where(trained.any(axis=1), trained.shape[1] - trained[:, ::-1].argmax(axis=1), 0)


def _read(shown: Rollouts | Hints) -> list[bytes]:
    """Every row's prompt without padding, b"" for none; as bytes, so that equal ones are found."""
    prompt, length = np.asarray(shown.prompt, np.int32), np.asarray(shown.prompt_length)
    width = prompt.shape[1]
    return [row[width - n :].tobytes() for row, n in zip(prompt, length, strict=True)]


def assign(
    prompts: Mapping[str, Sequence[bytes]], length: np.ndarray, sizes: Sizes, rows: Iterable[int]
) -> tuple[list[list[int]], np.ndarray]:
    """The rows of each stream: those of the largest groups first, and the longest of them.

    A row joins a stream that has its prompt, or else the first in which it fits (first-fit
    decreasing).

    Args:
      prompts: of every row, by model.
      length: i[B], of the responses.

    Returns:
      The rows of each stream, and what they take of its room, i[streams, numbers of `Sizes.room`].

    Raises:
      ValueError: a row does not fit into an empty stream.
    """
    names, room, length = list(sizes.streams), sizes.room().tolist(), length.tolist()
    bins, free = [], [room.copy()]  # an empty stream is behind those that are used
    holders = defaultdict(list)  # streams that have a prompt, by model and prompt
    for row in _largest_first(prompts[STUDENT], length, list(rows)):
        own = [(i, prompts[name][row]) for i, name in enumerate(names) if prompts[name][row]]
        need = [0] * 2 * len(names) + [length[row], 1]
        for i, prompt in own:
            width = len(prompt) // 4
            need[2 * i : 2 * i + 2] = width + length[row] - 1, width
        needs = {}  # of the streams that have a prompt of the row
        for i, prompt in own:
            for j in holders[i, prompt]:
                needs.setdefault(j, need.copy())[2 * i] -= len(prompt) // 4
        for j in itertools.chain(needs, range(len(free))):
            if all(map(operator.le, needs.get(j, need), free[j])):
                break
        else:
            raise ValueError(f"row {row}: needs {need}, a stream has {room}")
        if j == len(bins):
            bins.append([])
            free.append(room.copy())
        bins[j].append(row)
        free[j] = [*map(operator.sub, free[j], needs.get(j, need))]
        for key in own:
            if j not in holders[key]:
                holders[key].append(j)
    used = np.array(room) - np.array(free[: len(bins)], int).reshape(-1, len(room))
    return bins, used


def _largest_first(prompts: Sequence[bytes], length: Sequence[int], rows: list[int]) -> list[int]:
    total = defaultdict(int)
    for row in rows:
        total[prompts[row]] += length[row]
    return sorted(rows, key=lambda row: (-total[prompts[row]], prompts[row], -length[row]))


def _pack_stream(
    rows: Sequence[int],
    prompts: Mapping[str, Sequence[bytes]],
    response: np.ndarray,
    length: np.ndarray,
    sizes: Sizes,
) -> Part:
    """One stream of a part, without the leading axis R."""
    M, W, B, n = sizes.responses, sizes.rows, len(response), length[rows]
    rows_, token = np.full(W, B, np.int32), np.zeros(M, np.int32)
    row_, t = np.full(M, W, np.int32), np.zeros(M, np.int32)
    m = n.sum()
    rows_[: len(rows)] = rows
    row_[:m], t[:m] = np.arange(len(rows)).repeat(n), _counting(0 * n, n)
    token[:m] = response[rows][row_[:m], t[:m]]
    streams = {
        name: _read_by([prompts[name][row] for row in rows], response[rows], n, size, M)
        for name, size in sizes.streams.items()
    }
    return Part(streams, rows_, token, row_, t, np.int32(m))


def _read_by(
    prompts: Sequence[bytes], response: np.ndarray, length: np.ndarray, size: Size, M: int
) -> Stream:
    """A model's stream, without the leading axis R."""
    (N, C), W = size, len(prompts)
    read = np.array([len(prompt) > 0 for prompt in prompts], bool)
    number = {prompt: k for k, prompt in enumerate(dict.fromkeys(prompts))}
    of_row, K = np.array([number[prompt] for prompt in prompts], int), len(number)
    ids = [np.frombuffer(prompt, np.int32) for prompt in number]
    ids += [row[:n] for row, n in zip(response, np.where(read, length - 1, 0), strict=True)]
    sizes = np.array([len(x) for x in ids], int)
    start, at = sizes.cumsum() - sizes, sizes.sum()
    p = sizes[of_row]  # of each row's prompt
    token, position, segment = np.zeros((3, N), np.int32)
    prefix, prefix_segment = np.zeros(C, np.int32), np.full(C, NO_SEGMENT, np.int32)
    predictor = np.full(M, N, np.int32)
    token[:at] = np.concatenate([token[:0], *ids])  # there may be no row
    position[:at] = _counting(np.append(np.zeros(K, int), p), sizes)
    segment[:at] = np.arange(K + W).repeat(sizes)
    # A padding token sees itself only.
    segment[at:] = K + W + np.arange(N - at)
    prefix[: p.sum()] = _counting(start[of_row], p)
    prefix_segment[: p.sum()] = (K + np.arange(W)).repeat(p)
    # The prompt's end predicts the first token, and each token the next; nothing is after the last.
    places = _counting(start[K:] - 1, length)
    places[length.cumsum() - length] = start[of_row] + p - 1
    predictor[: len(places)] = np.where(read.repeat(length), places, N)
    return Stream(token, position, segment, prefix, prefix_segment, predictor, np.int32(at))


def _counting(first: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """first[i], first[i] + 1 ..., sizes[i] numbers, one i after the other.

    >>> _counting(np.array([5, 0]), np.array([3, 2])).tolist()
    [5, 6, 7, 0, 1]
    """
    behind = sizes.cumsum() - sizes
    return np.arange(sizes.sum()) + (first - behind).repeat(sizes)


def padding(parts: Sequence[Part], model: str = STUDENT) -> float:
    """The share of a model's computed tokens that are padding."""
    streams = [part.streams[model] for part in parts]
    return 1 - sum(s.count.sum() for s in streams) / sum(s.token.size for s in streams)
