"""``PackedDataset``: packed rows for a DataLoader, by epochs, shared among ranks, resumable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from effpass.rows.packed import check_indexable, make_row, padding_rate
from effpass.rows.plan import Epoch, Plan
from effpass.rows.row import Row
from effpass.rows.samples import IDS, Sample, check_alike, check_lengths, read_sample

EPOCH, START, FINISHED, IN_WORKERS = range(4)  # places in what the processes share


class PackedDataset(IterableDataset[Row]):
    """Rows of at most ``max_tokens`` tokens: ``DataLoader(PackedDataset(...), batch_size=None)``.

    ``dataset``, ``policy``, ``window`` and the arguments from ``position_start`` on: as of
    ``effpass.pack``. ``lengths``: the length of each sequence, where known; without it every
    sequence is read once, here. With ``shuffle`` each epoch (``set_epoch``) packs another order.
    ``rank`` of ``world_size`` gets its share: equally many rows, near-equal tokens at every step,
    each sequence on exactly one rank (the guarantee: ``effpass.rows.Plan``). With ``drop_last``
    rows that do not divide among the ranks are dropped, and ``dropped`` tells which sequences.

    Workers of a DataLoader share the rows of the rank, in the same order for any number of them.
    A row is read from ``dataset`` when it is its turn.
    """

    def __init__(
        self,
        dataset: Any,
        max_tokens: int,
        policy: str = "greedy",
        *,
        window: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        lengths: Sequence[int] | None = None,
        position_start: int = 0,
        fields: Sequence[str] | None = None,
        pad_to_max: bool = False,
        pad_token_id: int = 0,
    ) -> None:
        check_indexable(dataset)
        if not len(dataset):
            raise ValueError("expected a dataset of at least one sequence, found none")
        self.dataset, self.fields, self.rank = dataset, fields, rank
        self.position_start, self.pad_token_id = position_start, pad_token_id
        self.pad_to_max = pad_to_max
        self._first = read_sample(dataset[0], 0, fields)
        known = self._measured() if lengths is None else tuple(map(int, lengths))
        if len(known) != len(dataset):
            raise ValueError(f"expected {len(dataset)} lengths, found {len(known)}")
        self.plan = Plan(known, max_tokens, policy, window, shuffle, seed, world_size, drop_last)
        check_lengths(known, max_tokens)
        if rank not in range(world_size):
            raise ValueError(f"expected rank to be of 0 to {world_size - 1}, found {rank!r}")
        self._shared = torch.zeros(4, dtype=torch.int64).share_memory_()
        self._used = 0
        self._planned: tuple[int, Epoch] | None = None

    @property
    def epoch(self) -> int:
        """The epoch that the next pass gives rows of."""
        return int(self._shared[EPOCH])

    @property
    def dropped(self) -> tuple[int, ...]:
        """The sequences that no rank gets in this epoch; none without ``drop_last``."""
        return self._plan(self.epoch).dropped

    @property
    def padding_rate(self) -> float:
        """The share of rows * max_tokens that holds no token, in this epoch, over all ranks."""
        rows = [row for step in self._plan(self.epoch).steps for row in step]
        return padding_rate(sum(map(self.plan.tokens, rows)), len(rows), self.plan.max_tokens)

    def __len__(self) -> int:
        """Rows of each rank in this epoch, from its beginning; epochs may differ with shuffle."""
        return len(self._plan(self.epoch).steps)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass give the rows of this epoch; seen by workers that persist, too.

        Where that epoch was resumed and not finished yet, its rows go on where they stopped.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"expected epoch to be an integer from 0 on, found {epoch!r}")
        if epoch != self.epoch or self._shared[FINISHED]:
            self._goto(epoch, 0)

    def state_dict(self, row: Row | None = None) -> dict[str, Any]:
        """Where the rows go on after ``row``, the last one used; by default the last one given.

        After the last row of an epoch that is the beginning of the next. Raises RuntimeError
        without ``row`` when a DataLoader's workers read: they are ahead of what was used.
        """
        if row is None and (get_worker_info() or self._shared[IN_WORKERS]):
            raise RuntimeError(
                "expected the row that was used last: workers read ahead, so this process does "
                "not know it; call state_dict(row)"
            )
        if row is not None and (row.epoch is None or row.step is None):
            raise ValueError("expected a row of a PackedDataset, found one without epoch and step")
        epoch, step = self.epoch, self._used
        if row is not None and row.epoch is not None and row.step is not None:
            epoch, step = row.epoch, row.step + 1
        if step == len(self._plan(epoch).steps):
            epoch, step = epoch + 1, 0
        rows = self._plan(epoch).checksum
        return {"epoch": epoch, "step": step, **self.plan.settings, "checksum_of_rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next pass go on where ``state`` was taken, with the very rows that are left.

        The state of one rank serves all, and any number of workers. Raises ValueError, naming what
        differs, unless the sequences' lengths and all that decides the rows are the same.
        """
        settings = self.plan.settings
        differing = [
            f"{name} {state.get(name)!r} (here {value!r})"
            for name, value in settings.items()
            if name not in state or state[name] != value
        ]
        if differing or not {"epoch", "step", "checksum_of_rows"} <= set(state):
            raise ValueError(
                "expected the state of a PackedDataset with the same sequences and settings, found "
                f"{', '.join(differing) or sorted(state)}: its rows would be others"
            )
        plan, step = self._plan(state["epoch"]), state["step"]
        if plan.checksum != state["checksum_of_rows"] or step not in range(len(plan.steps)):
            raise ValueError(
                f"expected the rows of epoch {state['epoch']} to be those of the saved run, found "
                "others: this version packs in another way, begin an epoch with set_epoch"
            )
        self._goto(state["epoch"], state["step"])

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        epoch, start, finished = self._shared[: FINISHED + 1].tolist()
        self._shared[IN_WORKERS] = worker is not None
        self._used = start
        steps = range(start + first, len(self._plan(epoch).steps), stride)
        # asked of one worker only: another may begin after the first is through
        return self._rows(epoch, steps, partial=bool(start and finished and first == 0))

    def _rows(self, epoch: int, steps: range, partial: bool) -> Iterator[Row]:
        if partial:
            raise RuntimeError(
                f"epoch {epoch} was resumed at step {steps.start} and is finished: call "
                f"set_epoch({epoch + 1}) before the next pass, or it would lack its first rows"
            )
        for step in steps:
            row = self._row(epoch, step)
            self._used = step + 1
            yield row
        worker = get_worker_info()
        if (worker is None or worker.id == 0) and epoch == self.epoch:
            self._shared[FINISHED] = 1

    def _row(self, epoch: int, step: int) -> Row:
        indices = self._plan(epoch).steps[step][self.rank]
        samples = [self._sample(index) for index in indices]
        room = self.plan.max_tokens - self.plan.tokens(indices)
        return make_row(
            samples,
            indices,
            position_start=self.position_start,
            padding=room if self.pad_to_max else 0,
            pad_token_id=self.pad_token_id,
            epoch=epoch,
            step=step,
        )

    def _sample(self, index: int) -> Sample:
        sample = read_sample(self.dataset[index], index, self.fields)
        check_alike(sample, self._first, index)
        length, expected = len(sample[IDS]), self.plan.lengths[index]
        if length != expected:
            raise ValueError(
                f"expected {expected} tokens in sequence {index}, as when it was measured or by "
                f"lengths=, found {length}: a dataset must give the same sequence every time"
            )
        return sample

    def _measured(self) -> tuple[int, ...]:
        found = []
        for index in range(len(self.dataset)):
            sample = read_sample(self.dataset[index], index, self.fields)
            check_alike(sample, self._first, index)
            found.append(len(sample[IDS]))
        return tuple(found)

    def _plan(self, epoch: int) -> Epoch:
        if self._planned is None or self._planned[0] != epoch:
            self._planned = (epoch, self.plan.epoch(epoch))
        return self._planned[1]

    def _goto(self, epoch: int, step: int) -> None:
        self._shared[:] = torch.tensor([epoch, step, 0, 0])
        self._used = step

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._shared.share_memory_()  # plain pickles hold a copy
