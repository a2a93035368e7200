"""What is learnt at the places where an answer's tokens are predicted. All sums are in nats, over tokens."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

# logits, expected ids, the teacher's logits or None -> loss; logits [tokens, vocabulary]
Objective = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def answers(logits: Tensor, expected: Tensor, teacher: Tensor | None) -> Tensor:
    """Cross-entropy on the answer."""
    return cross_entropy(logits, expected, reduction="sum")


def distill(logits: Tensor, expected: Tensor, teacher: Tensor | None) -> Tensor:
    """KL from the same model under full attention: what it would have said, word by word (KV Packet, 2604.13226)."""
    assert teacher is not None
    return kl_div(log_softmax(logits, -1), log_softmax(teacher, -1), log_target=True, reduction="sum")


def mixed(logits: Tensor, expected: Tensor, teacher: Tensor | None) -> Tensor:
    """Half of each."""
    return (answers(logits, expected, teacher) + distill(logits, expected, teacher)) / 2


OBJECTIVES: dict[str, Objective] = {"answers": answers, "distill": distill, "mixed": mixed}
NEEDS_TEACHER = frozenset({"distill", "mixed"})
