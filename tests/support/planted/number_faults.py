"""Faults in what is made of the keys: options, the softmax, merges, where rows are stored."""

from __future__ import annotations

import numpy as np

from .walk import PARTITION, Fault, State


class Option(Fault):
    """An option is lost or changed before it is used."""

    def __init__(self, name: str, option: str, change):
        self.name, self.option, self.change = name, option, change

    def options(self, problem):
        value = getattr(problem, self.option)
        return {} if value is None else {self.option: self.change(value)}


class ScaleOfValues(Fault):
    """The scale is taken from V's head_dim."""

    name = "scale from v_head_dim"

    def options(self, problem):
        return {} if problem.scale else {"scale": problem.v_pages.shape[3] ** -0.5}


class CapLast(Fault):
    """Softcap after ALiBi and mask."""

    name = "softcap after alibi and mask"

    def options(self, problem):
        return {"softcap": None}

    def scores(self, score, walk, problem):
        return problem.softcap * np.tanh(score / problem.softcap) if problem.softcap else score


class CapOverflow(Fault):
    """tanh as a quotient of exponentials, which overflow far in saturation."""

    name = "softcap overflows"

    def options(self, problem):
        return {"softcap": None} if self._alone(problem) else {}

    def scores(self, score, walk, problem):
        if not self._alone(problem):
            return score
        growth = np.exp(np.float32(2) * score / np.float32(problem.softcap))
        return np.float32(problem.softcap) * (growth - 1) / (growth + 1)

    def _alone(self, problem):
        return problem.softcap and problem.mask is None and problem.alibi_slopes is None


class UnsignedDistance(Fault):
    """ALiBi's distance as an unsigned difference."""

    name = "alibi distance wraps"

    def scores(self, score, walk, problem):
        if problem.alibi_slopes is None:
            return score
        behind = walk.position[None, :] < walk.query_positions[:, None]
        return score + problem.alibi_slopes[:, None, None] * behind * np.float32(2.0**32)


class SinkCountedTwice(Fault):
    """The sink enters in every partition."""

    name = "sink counted once per partition"

    def finish(self, state: State, walk, problem):
        if state.sinks is not None and walk.context_len > PARTITION:
            state.sinks = state.sinks + np.float32(np.log(2))


class SinkFillsEmptyRows(Fault):
    """A row that sees nothing gets the sink as its log-sum-exp."""

    name = "an empty row's lse is the sink"

    def result(self, out, lse, walk):
        return out, np.where(np.isneginf(lse), 0, lse)


class EmptyRowsLeft(Fault):
    """A row that sees nothing is not written."""

    name = "an empty row is not written"

    def result(self, out, lse, walk):
        return np.where(np.isneginf(lse)[..., None], 1, out), lse


class ClampedMaximum(Fault):
    """The maximum starts at 0."""

    name = "maximum clamped at 0, denominator + 1e-6"

    def finish(self, state: State, walk, problem):
        seen = state.largest > -np.inf
        new = np.where(seen, np.maximum(state.largest, 0), state.largest)
        decay = np.where(seen, np.exp(state.largest - new), 1)
        state.total = state.total * decay + np.float32(1e-6)
        state.mixed, state.largest = state.mixed * decay[..., None], new


class NoMaximum(Fault):
    """Exponentials without subtracting the maximum."""

    name = "no maximum subtracted"

    def finish(self, state: State, walk, problem):
        growth = np.exp(np.where(state.largest > -np.inf, state.largest, 0))
        state.total, state.mixed = state.total * growth, state.mixed * growth[..., None]
        state.largest = np.where(state.largest > -np.inf, 0, state.largest)


class MergeWithoutWeights(Fault):
    """Partitions are averaged as if each had the same denominator."""

    name = "partitions merged without their weights"

    def walk(self, walk, problem):
        number = walk.position // PARTITION
        if walk.context_len > PARTITION:
            walk.counts *= np.where(number == number.min(), 2, 1).astype(np.float32)


class HalfPrecisionSum(Fault):
    """The denominator is kept in half precision."""

    name = "denominator in float16"

    def finish(self, state: State, walk, problem):
        state.total = state.total.astype(np.float16).astype(np.float32)


class BaseTwoLse(Fault):
    """The log-sum-exp is in base 2."""

    name = "lse in base 2"

    def result(self, out, lse, walk):
        return out, lse * np.float32(1.4426950408889634)


class NextToken(Fault):
    """Query tokens are stored one row on."""

    name = "rows of a sequence rotated"

    def result(self, out, lse, walk):
        return np.roll(out, 1, axis=0), np.roll(lse, 1, axis=0)


class NextHead(Fault):
    """Query heads are stored one on."""

    name = "query heads rotated"

    def result(self, out, lse, walk):
        return np.roll(out, 1, axis=1), np.roll(lse, 1, axis=1)


class NaturalScores(Fault):
    """Powers of two of scores that were not turned into base 2."""

    name = "base 2 of natural scores"

    def scores(self, score, walk, problem):
        return score * np.float32(np.log(2))


class ValuesOfHeadZero(Fault):
    """Every head reads the values of KV head 0."""

    name = "values of KV head 0 for all"

    def values(self, values, seen):
        return super().values(np.repeat(values[:, :1], values.shape[1], axis=1), seen)


class ValuesOneOn(Fault):
    """The weight of a key multiplies the value of the next."""

    name = "values one key on"

    def values(self, values, seen):
        return np.roll(super().values(values, seen), 1, axis=0)


class AlibiOfKeys(Fault):
    """ALiBi from the key's position alone: the output survives, the lse does not."""

    name = "alibi without the query position"

    def scores(self, score, walk, problem):
        if problem.alibi_slopes is None:
            return score
        positions = walk.query_positions[:, None].astype(np.float32)
        return score + problem.alibi_slopes[:, None, None] * positions


class LseWithoutSink(Fault):
    """The sink takes weight in the output but is not in the log-sum-exp."""

    name = "lse without the sink"

    def finish(self, state: State, walk, problem):
        self.before = state.largest + np.log(state.total)

    def result(self, out, lse, walk):
        return out, np.where(np.isneginf(lse), lse, self.before.T)


class UnnormalisedRows(Fault):
    """Rows of a merge are left as they were before the division."""

    name = "long rows not normalised"

    def finish(self, state: State, walk, problem):
        if walk.context_len > PARTITION:
            state.mixed = state.mixed * state.total[..., None]
