"""The gate of the machine code itself: every fault in a row is named, and a good row passes (interpreter only)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.gpu.aot import amdgcn, gate, sass
from tests.gpu.aot.gate import CaseRow, problems
from tests.gpu.aot.row import Row

CASE = "attention/decode/llama-3-8b"
KEY = f"{CASE} split_kernel"
GOOD = Row(
    "split_kernel", "cuda:90", 4, 168, 0, 70000, 3, "registers", {"HMMA.16816": 64}, {16: 80, 4: 9}, 0, 250, {16: 16}
)


@pytest.fixture(autouse=True)
def _baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {KEY: {"cuda:90": {"loop": 250, "ctas": 3, "shared": 70000}}}
    monkeypatch.setattr(gate, "read_baseline", lambda: known)


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
        ({"loop_loads": {16: 1, 4: 12}}, "25% of the bytes"),
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


GCN = """
kernel:
	global_load_dwordx4 v[0:3], v4, s[0:1]
.LBB0_1:
	global_load_dwordx2 v[0:1], v4, s[0:1]
	v_mfma_f32_16x16x16_f16 a[0:3], v[0:1], v[2:3], a[0:3]
	s_cbranch_scc1 .LBB0_1
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
    assert (code.widths(), code.loop_widths()) == ({16: 1, 8: 1}, {8: 1})
