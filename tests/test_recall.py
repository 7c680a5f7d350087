"""The recall task asks what it shows, and the benchmark's measures are what they say."""

from __future__ import annotations

import torch

from tests.scripts import load


def test_every_question_has_its_answer_in_the_row() -> None:
    recall = load("train_recall.py")
    task = recall.Task(tokens=40, pairs=5)
    ids, targets = task.batch(16, torch.Generator().manual_seed(0))
    assert ids.shape == (16, 40) and ids.max() < task.vocabulary
    parities = set()
    for row, asked in zip(ids.tolist(), targets.tolist(), strict=True):
        shown = {row[i]: row[i + 1] for i in range(34) if row[i] < task.keys}
        parities |= {i % 2 for i in range(34) if row[i] < task.keys}
        questions = [i for i in range(40) if asked[i] != recall.IGNORED]
        assert questions == [35, 36, 37, 38, 39] and len(shown) == 5
        assert [shown[row[i]] for i in questions] == [asked[i] for i in questions]
    assert parities == {0, 1}


def test_accuracy_counts_answers() -> None:
    recall = load("train_recall.py")
    task = recall.Task(tokens=40)

    class Told:
        """Logits of what stands one behind the last place of each token."""

        def __init__(self, input_ids: torch.Tensor) -> None:
            answers = torch.zeros_like(input_ids)
            for row, answer in zip(input_ids.tolist(), answers, strict=True):
                told = {row[i]: row[i + 1] for i in range(40 - task.pairs)}
                answer[:] = torch.tensor([told.get(each, 0) for each in row])
            self.logits = torch.nn.functional.one_hot(answers, task.vocabulary).float()

    assert recall.accuracy(Told, task, rows=8) == 1.0
    assert recall.accuracy(lambda input_ids: Told(0 * input_ids), task, rows=8) == 0.0


def test_ranks_are_spearmans() -> None:
    ranks = load("benchmarks/token_reduction.py").ranks
    x = torch.randn(6, 3)
    assert abs(ranks(x, 2 * x) - 1) < 1e-6
