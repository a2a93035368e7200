"""Products of few rows with float32 weights on a CPU, asked for the way round that the matrix library does quickly.

Links, a question, the newest tokens of several answers: a few rows, which `Linear` multiplies as x @ W^T. Which kernel
MKL takes for them depends on how W lies in memory and on what is written first. All products of a 135M model, 2 cores:

* Intel Xeon with AVX-512: 4 rows take 53 ms, 16 rows 110, 56 rows 152; with W laid by columns, so that a product reads
  W^T in order, 34, 46 and 92. One row, and 64 or more, take the same either way. Laying takes 0.4 s, so only weights
  are laid that read questions. Written (W @ x^T)^T the same rows take 48, 53 and 123.
* AMD EPYC without AVX-512: 4 rows 153 ms, 56 rows 305; written (W @ x^T)^T, 64 and 241. From some 200 rows on the
  usual way is quicker.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
MAX_ROWS = 48 if HAS_AVX512 else 128


class FewRowsLinear(nn.Linear):
    """A Linear layer whose products of 2 to MAX_ROWS rows are written weights first; others, and training, as ever."""

    def forward(self, input: Tensor) -> Tensor:
        num_rows = input.numel() // self.in_features
        if not 2 <= num_rows <= MAX_ROWS or torch.is_grad_enabled():
            return functional.linear(input, self.weight, self.bias)
        output = (self.weight @ input.reshape(num_rows, self.in_features).t()).t().contiguous()
        if self.bias is not None:
            output += self.bias
        return output.view(*input.shape[:-1], self.out_features)


def prepare(model: Any, *, reads_questions: bool) -> None:
    """Let every plain Linear layer of `model` that holds float32 weights on a CPU take few rows quickly.

    reads_questions: whether few rows are what it mostly gets, so that laying its weights anew is worth the time. A
    matrix that is an embedding too is never laid: its rows are looked up.
    """
    embeddings = {module.weight.data_ptr() for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if type(module) is not nn.Linear or not _is_ours(module.weight) or not module.weight.is_contiguous():
            continue  # or it is laid already
        if HAS_AVX512 and reads_questions and module.weight.data_ptr() not in embeddings:
            module.weight.data = module.weight.data.t().contiguous().t()
        else:
            module.__class__ = FewRowsLinear


def added(weight: Tensor, share: Tensor) -> Tensor:
    """weight + share [out, in], laid in memory as `prepare` would lay it, which then has nothing left to do."""
    if not HAS_AVX512 or not _is_ours(weight):
        return weight + share
    by_columns = torch.empty(weight.t().shape)
    return torch.add(weight.t(), share.t(), out=by_columns).t()


def _is_ours(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu"
