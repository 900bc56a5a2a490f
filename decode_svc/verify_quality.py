"""`python -m decode_svc.verify_quality`: what weight formats do to a model's predictions. Lines of JSON on standard output.

Standard input holds the text's tokens as JSON. A format is `int8`, or `int8/int4` for prefill in one and decode in another; each is
compared with float32 weights and KV, which is what the model's file says. KV is in --kv-dtype.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from llm.errors import UnsupportedModelError, WeightsError
from llm.kv.layout import KvLayout, KvWish
from llm.kv.pool import KvPool
from llm.quality import Pair, Quality, Tally, blocks_needed, compare, windows_of
from llm.runner import ModelRunner, RunnerSettings
from llm.weight_format import WeightFormat
from tandem.models import ModelError, ModelFiles, cache_directory, resolve_model

BLOCK_TOKENS = 16
Say = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Formats:
    """What prefill and decode take."""

    prefill: WeightFormat
    decode: WeightFormat

    @property
    def name(self) -> str:
        return self.prefill if self.prefill == self.decode else f"{self.prefill}/{self.decode}"


class Runners:
    """Each role and format is loaded once."""

    def __init__(self, files: ModelFiles, threads: int | None, kv_dtype: KvWish = "auto") -> None:
        self._files, self._threads, self._kv_dtype = files, threads, kv_dtype
        self._loaded: dict[RunnerSettings, ModelRunner] = {}

    def pair(self, formats: Formats, window_tokens: int) -> Pair:
        told = RunnerSettings("prefill", kv_dtype=self._kv_dtype, threads=self._threads, cache_directory=cache_directory())
        decode = replace(told, role="decode", weights=formats.decode)
        return self._pair(replace(told, weights=formats.prefill), decode, window_tokens)

    def exact(self, window_tokens: int) -> Pair:
        """Float32 weights and KV."""
        told = RunnerSettings("prefill", dtype="float32", threads=self._threads, cache_directory=cache_directory())
        return self._pair(told, replace(told, role="decode"), window_tokens)

    def _pair(self, prefill: RunnerSettings, decode: RunnerSettings, window_tokens: int) -> Pair:
        runners = [self._runner(settings) for settings in (prefill, decode)]
        config = runners[0].config
        layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, BLOCK_TOKENS, runners[0].kv_dtype)
        return Pair(runners[0], runners[1], KvPool.create(layout, blocks_needed(window_tokens, BLOCK_TOKENS)))

    def _runner(self, settings: RunnerSettings) -> ModelRunner:
        if settings not in self._loaded:
            self._loaded[settings] = ModelRunner.load(self._files, settings)
        return self._loaded[settings]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares weight formats with float32, on the CPU.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", type=parse_formats, nargs="+", required=True, metavar="FORMAT[/FORMAT]")
    parser.add_argument("--window", type=int, default=512, help="tokens that are predicted from one beginning")
    parser.add_argument("--kv-dtype", choices=get_args(KvWish), default="auto", help="what KV is kept in")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    try:
        runners = Runners(resolve_model(arguments.model), arguments.threads or None, arguments.kv_dtype)
        run(runners, arguments.weights, json.load(sys.stdin), arguments.window, say)
    except (ModelError, UnsupportedModelError, WeightsError) as error:
        sys.exit(str(error))


def parse_formats(text: str) -> Formats:
    names = text.split("/")
    for name in names:
        if name not in get_args(WeightFormat):
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(get_args(WeightFormat))}")
    if len(names) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} names more than two formats")
    return Formats(names[0], names[-1])  # type: ignore[arg-type]


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def run(runners: Runners, formats: Sequence[Formats], tokens: Sequence[int], window_tokens: int, say: Say) -> None:
    """Says {"progress": 0.5} now and then, and one result for each of `formats`."""
    reference = runners.exact(window_tokens)
    pairs = [runners.pair(each, window_tokens) for each in formats]
    qualities = compare(reference, pairs, windows_of(tokens, window_tokens), lambda done: say({"progress": done}))
    for each, quality in zip(formats, qualities, strict=True):
        say({"weights": each.name, **_figures(quality)})


def _figures(quality: Quality) -> dict[str, Any]:
    def of(tally: Tally) -> dict[str, float]:
        return {
            "positions": tally.positions,
            "perplexity": tally.perplexity,
            "perplexity_ratio": tally.perplexity_ratio,
            "divergence": tally.mean_divergence,
            "agreement": tally.agreement,
        }

    return {"prefill": of(quality.prefill), "decode": of(quality.decode)}


if __name__ == "__main__":
    main()
