"""The test kit: ranks as processes, named cases, payloads that know their origin, exact comparisons, leak checks.

Public, so that whoever builds on moecomm can test on the same ground. `moecomm.testing.conformance` runs the named
cases against the oracle in `moecomm.reference`.
"""

from moecomm.testing.asserts import Mismatch, assert_bitwise, assert_error_bounded, first_mismatch
from moecomm.testing.cases import CASES, Case, random_case
from moecomm.testing.launcher import RankFailure, RankPool, run_ranks
from moecomm.testing.leaks import no_leaks
from moecomm.testing.provenance import RowOrigin, decode_provenance, provenance_rows

__all__ = [
    "CASES",
    "Case",
    "Mismatch",
    "RankFailure",
    "RankPool",
    "RowOrigin",
    "assert_bitwise",
    "assert_error_bounded",
    "decode_provenance",
    "first_mismatch",
    "no_leaks",
    "provenance_rows",
    "random_case",
    "run_ranks",
]
