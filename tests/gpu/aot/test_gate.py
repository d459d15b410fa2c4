"""The gate of the machine code itself: every fault in a row is named, and a good row passes (interpreter only)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.gpu.aot import amdgcn, gate, row, sass
from tests.gpu.aot.gate import CaseRow, Waiver, problems
from tests.gpu.aot.row import Row
from tests.gpu.aot.targets import TARGETS

CASE = "attention/decode/llama-3-8b"
KEY = f"{CASE} split_kernel"
GOOD = Row(
    kernel="split_kernel",
    target="cuda:90",
    warps=4,
    registers=168,
    shared=70000,
    ctas=3,
    limit="registers",
    matrix={"HMMA.16816": 64},
    loads={16: 80, 4: 9},
    loop=250,
    loop_loads={16: 16},
    size=2000,
    stores=12,
)
WAIVERS = gate.WAIVERS
NARROW = {16: 1, 4: 12}  # 25 % of these bytes come 16 at a time


@pytest.fixture(autouse=True)
def _baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {KEY: {"cuda:90": {"loop": 250, "ctas": 3, "shared": 70000}}}
    monkeypatch.setattr(gate, "read_baseline", lambda: known)
    monkeypatch.setattr(gate, "WAIVERS", ())


def found(**changes: object) -> list[str]:
    return problems([CaseRow(CASE, KEY, (1,), replace(GOOD, **changes))])  # type: ignore[arg-type]


def test_a_good_row_passes() -> None:
    assert found() == []
    assert found(loop=257) == []  # within 3 %


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"error": "OutOfResources: shared memory"}, "does not compile"),
        ({"spills": 8}, "spills 8"),
        ({"matrix": {}}, "no matrix instruction"),
        ({"matrix": {"IMMA.16832": 8}}, "no matrix instruction for float"),
        ({"stores": 0, "size": 16, "registers": 4, "tensor_memory": 528}, "stores nothing: 16 instructions"),
        ({"loop_loads": NARROW}, "25% of the bytes"),
        ({"loop": 258}, "258 instructions, baseline 250"),
        ({"loop": 281}, "the goal is 280"),
        ({"ctas": 2}, "2 CTAs per SM"),
        ({"shared": 70001}, "70001 bytes of shared memory"),
        ({"target": "cuda:80"}, "not in baseline"),
    ],
)
def test_every_fault_is_named(changes: dict[str, object], text: str) -> None:
    lines = found(**changes)
    assert any(text in line for line in lines), lines


def waive(monkeypatch: pytest.MonkeyPatch, known: dict[str, float], *, kernel: str = "split_kernel") -> None:
    """Narrow loads of one kernel are waived; known: what the baseline says was waived of GOOD and of its second."""
    monkeypatch.setattr(gate, "WAIVERS", (Waiver(CASE, kernel, "cuda:90", "wide", "because"),))
    numbers = {"loop": 250, "ctas": 3, "shared": 70000}
    waived = {**numbers, "waived": known} if known else numbers
    is_second = kernel.endswith("#2")
    baseline = {KEY: {"cuda:90": numbers if is_second else waived}, f"{KEY}#2": {"cuda:90": waived}}
    monkeypatch.setattr(gate, "read_baseline", lambda: baseline)


def test_what_is_waived_may_not_become_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    waive(monkeypatch, {"wide": 0.45})
    assert found(loop_loads=NARROW) == []
    (line,) = found(loop_loads={16: 1, 4: 12, 2: 8})
    assert "20% of the bytes" in line
    assert line.endswith("worse than what is waived")


def test_a_waiver_is_for_the_rows_that_needed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    waive(monkeypatch, {})
    (line,) = found(loop_loads=NARROW)
    assert line.endswith("it did not when the baseline was made")


def test_a_waiver_that_nothing_needs_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    waive(monkeypatch, {"wide": 0.45})
    row_line, pattern_line = found()
    assert row_line.startswith(f"{KEY} on cuda:90: stale waiver: it passes 'wide' now")
    assert pattern_line == f"stale waiver: {CASE!r} (split_kernel) on 'cuda:90': no row needs it for 'wide'"
    waive(monkeypatch, {}, kernel="renamed_kernel")
    assert found() == [pattern_line.replace("split_kernel", "renamed_kernel")]


def test_a_waiver_is_for_one_of_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    waive(monkeypatch, {"wide": 0.45}, kernel="split_kernel#2")
    narrow = replace(GOOD, loop_loads=NARROW)
    second = CaseRow(CASE, f"{KEY}#2", (1,), narrow)
    assert problems([CaseRow(CASE, KEY, (1,), GOOD), second]) == []
    (line,) = problems([CaseRow(CASE, KEY, (1,), narrow), second])
    assert line == f"{KEY} on cuda:90: 25% of the bytes loaded come 16 at a time ({NARROW})"


def test_every_waiver_of_today_names_cases_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "WAIVERS", WAIVERS)
    assert list(gate._stale([])) == []


def test_tensor_memory_limits_the_ctas_of_an_sm() -> None:
    assert row._cuda_occupancy(TARGETS["cuda:100"], 64, 1024, 4, 0) == (8, "registers")
    assert row._cuda_occupancy(TARGETS["cuda:100"], 64, 1024, 4, 128) == (4, "tensor memory")


SASS = """
.text.kernel:
        /*0000*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R8], desc[UR4][R2.64] ;
        /*0020*/              @!P0 LDG.E.U8 R5, desc[UR4][R2.64] ;
        /*0030*/                   HMMA.16816.F32.BF16 R12, R4, R8, R12 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   STL.64 [R1], R4 ;
        /*0060*/                   EXIT ;
"""


def test_nvidia_code_is_read() -> None:
    instructions, loops = sass._parse(SASS)
    code = sass.Sass(instructions, loops, 32, 8)
    assert code.matrix() == {"HMMA.16816": 1}
    assert [item.base for item in code.main_loop()] == ["LDGSTS", "LDG", "HMMA", "BRA"]
    assert sass.widths(code.main_loop(), sass.LOADS) == {16: 1, 1: 1}
    assert code.count(("LDL", "STL")) == 1


# Decode with a peeled edge, in small: a loop over whole tiles, then one that masks, with as many matrix instructions
# and loads; behind them a loop over rows that loads more than either.
PEELED = """
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R8], desc[UR4][R2.64] ;
        /*0020*/                   HMMA.16816.F32.BF16 R12, R4, R8, R12 ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/                   LDGSTS.E.BYPASS.128 [R8], desc[UR4][R2.64] ;
        /*0050*/                   ISETP.GE.AND P0, PT, R3, R7, PT ;
        /*0060*/                   FSEL R12, R12, -INF , P0 ;
        /*0070*/                   HMMA.16816.F32.BF16 R12, R4, R8, R12 ;
        /*0080*/               @P2 BRA `(.L_x_2) ;
.L_x_3:
        /*0090*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*00a0*/                   LDG.E R5, desc[UR4][R2.64+0x4] ;
        /*00b0*/                   FADD R4, R4, R5 ;
        /*00c0*/               @P3 BRA `(.L_x_3) ;
        /*00d0*/                   STG.E.128 desc[UR4][R2.64], R12 ;
        /*00e0*/                   EXIT ;
"""


def test_the_main_loop_is_the_one_over_whole_tiles() -> None:
    code = sass.Sass(*sass._parse(PEELED), 32, 0)
    assert [item.base for item in code.main_loop()] == ["LDGSTS", "HMMA", "BRA"]
    assert code.count(sass.STORES) == 1


def test_a_masked_loop_is_the_main_loop_where_there_is_no_other() -> None:
    start, end = PEELED.index(".L_x_1:"), PEELED.index(".L_x_2:")
    code = sass.Sass(*sass._parse(PEELED[:start] + PEELED[end:]), 32, 0)
    assert [item.base for item in code.main_loop()] == ["LDGSTS", "ISETP", "FSEL", "HMMA", "BRA"]


# What ptxas makes of a kernel for sm_100 that wants more tensor memory than there is.
TRAP = """
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
        /*0010*/                   BPT.TRAP 0x1 ;
.L_x_0:
        /*0020*/                   BRA `(.L_x_0);
        /*0030*/                   NOP;
"""


def test_a_trap_stores_nothing() -> None:
    code = sass.Sass(*sass._parse(TRAP), 4, 0)
    assert (code.count(sass.STORES), code.matrix(), code.main_loop()) == (0, {}, ())


GCN = """
kernel:
	global_load_dwordx4 v[0:3], v4, s[0:1]
.LBB0_1:
	global_load_dwordx2 v[0:1], v4, s[0:1]
	v_mfma_f32_16x16x16_f16 a[0:3], v[0:1], v[2:3], a[0:3]
	s_cbranch_scc1 .LBB0_1
	global_store_dwordx4 v4, v[0:3], s[0:1]
	s_endpgm
    .vgpr_count:     64
    .vgpr_spill_count: 2
    .sgpr_spill_count: 0
    .private_segment_fixed_size: 16
"""


def test_amd_code_is_read() -> None:
    code = amdgcn.parse(GCN)
    assert (code.registers, code.spills, code.stack) == (64, 2, 16)
    assert code.matrix() == {"v_mfma_f32_16x16x16_f16": 1}
    assert code.main_loop() == (1, 1, 3)
    assert code.stores() == 1
    assert (code.widths(), code.loop_widths()) == ({16: 1, 8: 1}, {8: 1})
