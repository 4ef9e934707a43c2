"""What a check found: one number against one bound, and what to do where it is beyond it."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Check:
    """One line of the doctor.

    Attributes:
        ok: None where the check does not apply to the run, for the reason in `about`.
        measured: None where nothing was.
        bound: None where every number is as good.
        remedy: what to do; empty unless `ok` is False.
        about: what the number is, with its unit.
    """

    name: str
    ok: bool | None
    measured: float | None
    bound: float | None
    remedy: str
    about: str

    @classmethod
    def at_most(cls, name: str, measured: float, bound: float, remedy: str, about: str) -> Self:
        """Red above the bound, and where the number is none (NaN)."""
        return cls._told(name, measured <= bound, measured, bound, remedy, about)

    @classmethod
    def at_least(cls, name: str, measured: float, bound: float, remedy: str, about: str) -> Self:
        """Red below the bound, and where the number is none (NaN)."""
        return cls._told(name, measured >= bound, measured, bound, remedy, about)

    @classmethod
    def skipped(cls, name: str, why: str) -> Self:
        """Nothing to check, and why."""
        return cls(name, None, None, None, "", why)

    @classmethod
    def _told(cls, name: str, ok: bool, measured: float, bound: float, remedy: str, about: str) -> Self:
        return cls(name, bool(ok), float(measured), float(bound), "" if ok else remedy, about)
