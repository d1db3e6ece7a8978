"""Choice of the subjects of a data set that are used: all, only some, or all but some."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from dataset_utils.counts import some
from dataset_utils.recording import Windows
from dataset_utils.spec import ShardSpec
from registry.errors import UserError
from registry.parameters import suggest
from registry.text import spelt_alike


@dataclass
class Subjects:
    """The subjects that are used, and those that were met so far.

    Attributes:
        only: names of those that are used; () for all.
        without: names of those that are left out.
        met: name of each subject asked about, in the order of the files -> whether it is used.
    """

    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    met: dict[str, bool] = field(default_factory=dict)

    @staticmethod
    def of(spec: ShardSpec) -> Subjects:
        """Return the subjects that the parameters of shards choose."""
        return Subjects(spec.subjects, spec.exclude_subjects)

    def used(self, name: str) -> bool:
        """Return whether a subject is used, and remember its name."""
        own, only, without = spelt_alike(name), *(set(map(spelt_alike, names)) for names in (self.only, self.without))
        self.met[name] = (not only or own in only) and own not in without
        return self.met[name]

    def choose(self, windows: Windows) -> Windows:
        """Return the windows of the subjects that are used. Raises UserError as `check` does."""
        used = np.array([self.used(name) for name in windows.subjects])
        self.check()
        if used.all():
            return windows
        kept, number = used[windows.subject], np.cumsum(used) - 1
        rows = ("x", "y", "stretch", "start", "recording", "test")
        own = {name: array[kept] for name in rows if (array := getattr(windows, name)) is not None}
        names = tuple(name for name in windows.subjects if self.met[name])
        return dataclasses.replace(windows, **own, subject=number[windows.subject[kept]], subjects=names)

    def check(self) -> None:
        """Raise UserError where a chosen subject was never met, or none is used; not where there is no subject."""
        if not self.met:
            return
        for flag, names in (("--subjects", self.only), ("--exclude-subjects", self.without)):
            if unknown := [name for name in names if spelt_alike(name) not in map(spelt_alike, self.met)]:
                near = suggest(unknown[0], self.met)
                comma = any("," in name for name in self.met)
                how = "; write a name with a comma in a list in YAML (--config)" if comma else ""
                raise UserError(f"{flag}: there is no subject '{unknown[0]}'{near}; there are {some(self.met)}{how}")
        if not any(self.met.values()):
            raise UserError("--exclude-subjects: leaves none of the subjects; name fewer")

    def lines(self) -> list[str]:
        """Return a line on who is left out; none where nobody is."""
        left_out = [name for name, used in self.met.items() if not used]
        if not left_out:
            return []
        why = "not in --subjects" if self.only else "--exclude-subjects"
        return [f"{len(left_out)} of {len(self.met)} subjects are left out ({why}): {some(left_out)}"]
