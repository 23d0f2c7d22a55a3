"""Reading what a compiler printed: instructions, loops, address widths, from SASS, PTX and TTIR.

Only text goes in, so this needs neither a compiler nor a GPU. `static_report.py` is the door.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    jump: int | None = None  # address that it may branch to


# Class -> opcodes, up to the first dot unless the dot is written.
OPCODE_CLASSES = {
    "MUFU": "MUFU",
    "convert": "HADD2.F32 FHADD F2F F2FP F2I I2F I2FP F2IP I2I FRND",
    "float": "FFMA FMUL FADD FMNMX FSETP FSEL FSET FCHK FFMA2 FMUL2 FADD2 FMNMX3 HADD2 HMUL2 "
    "HMNMX2 HSETP2 DFMA DMUL DADD DSETP",
    "tensor": "HMMA IMMA QMMA HGMMA WARPGROUP UTCHMMA LDTM STTM",
    "load": "LDG LD LDGSTS",
    "store": "STG ST",
    "constant": "LDC ULDC LDCU",
    "smem": "LDS STS LDSM STSM",
    "local": "LDL STL",
    "shuffle": "SHFL REDUX",
    "barrier": "BAR DEPBAR LDGDEPBAR SYNCS MEMBAR",
    "atomic": "ATOM ATOMG ATOMS RED REDG",
    # HFMA2 of zeros is how the assembler writes a constant on a free pipe.
    "move": "MOV UMOV SEL USEL CS2R S2R S2UR R2UR HFMA2 R2P P2R PRMT UPRMT",
    "integer": "IADD3 IMAD LEA SHF LOP3 ISETP IABS IMNMX VIADD VIMNMX IADD PLOP3 UIADD3 UIMAD ULEA "
    "USHF ULOP3 UISETP UPLOP3 SGXT POPC FLO IADD32I",
    # BSYNC and WARPSYNC rejoin lanes after a branch; nothing is exchanged or waited for.
    "control": "BRA BSSY BSYNC WARPSYNC EXIT CALL RET BREAK YIELD NANOSLEEP VOTE VOTEU",
    "other": "",
}
_CLASS_OF = {opcode: name for name, opcodes in OPCODE_CLASSES.items() for opcode in opcodes.split()}


def opcode_class(opcode: str) -> str:
    base, _, rest = opcode.partition(".")
    return _CLASS_OF.get(f"{base}.{rest.partition('.')[0]}", _CLASS_OF.get(base, "other"))


_SASS_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.MULTILINE
)


def sass_instructions(text: str) -> list[Instruction]:
    """Instructions of `cuobjdump -sass` in address order."""
    code = []
    for address, opcode, operands in _SASS_LINE.findall(text):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.startswith("BRA") else None
        # Behind the last exit lie a branch to itself and padding.
        if opcode == "NOP" or (target and int(target[1], 16) == int(address, 16)):
            continue
        code.append(Instruction(int(address, 16), opcode, int(target[1], 16) if target else None))
    return code


def ptx_instructions(text: str) -> list[Instruction]:
    """Instructions of PTX, with line numbers for addresses."""
    labels, lines = {}, text.splitlines()
    for number, line in enumerate(lines):
        if label := re.match(r"\s*(\$L\w+):", line):
            labels[label[1]] = number
    code = []
    for number, line in enumerate(lines):
        if found := re.match(r"\s*(?:@!?%\w+\s+)?([a-z][\w.]*)\s+([^;]*);", line):
            jump = labels.get(found[2].strip()) if found[1].startswith("bra") else None
            code.append(Instruction(number, found[1], jump))
    return code


def loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """Address ranges of the innermost loops: from the target of a backward branch to the branch."""
    ends: dict[int, int] = {}
    for instruction in code:
        if instruction.jump is not None and instruction.jump < instruction.address:
            ends[instruction.jump] = max(instruction.address, ends.get(instruction.jump, 0))
    ranges = sorted(ends.items())
    return [a for a in ranges if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in ranges)]


def _exponentials(code: list[Instruction]) -> int:
    return sum("ex2" in i.opcode.lower() for i in code)


def step_loop(code: list[Instruction]) -> list[Instruction]:
    """The innermost loop with the most exponentials, then instructions; without loops, all code.

    Size alone would mislead: the assembler keeps remainder loops, and copies of a loop for the case
    that an inner one is empty.
    """
    bodies = [[i for i in code if start <= i.address <= end] for start, end in loops(code)]
    return max(bodies, key=lambda body: (_exponentials(body), len(body)), default=code)


def unroll_factor(loop: list[Instruction], ptx: str) -> int:
    """How often the assembler repeated the body of the step loop, by its exponentials."""
    before = _exponentials(step_loop(ptx_instructions(ptx)))
    return max(1, round(_exponentials(loop) / before)) if before else 1


def narrow_offsets(ttir: str, block_sizes: list[int]) -> list[str]:
    """Lines of TTIR where an offset may exceed 32 bits and is computed in 32.

    A program id must be widened before it meets a pointer or any factor but a block size, which
    only counts rows or channels: with more than 2^31 elements `program_id * stride` wraps around,
    silently. A loop counter stays within one sequence and may meet constants as it is, and so may
    the remainder of a division, which stays below the divisor.
    """
    constant = r"(%\w+) = arith\.constant (?:dense<)?(-?\d+)>? : (?:tensor<[\dx]*x)?i32"
    constants = dict(re.findall(constant, ttir))
    sizes = {name for name, value in constants.items() if int(value) in block_sizes}
    ids: set[str] = set()
    counters: set[str] = set()
    found = []
    for line in ttir.splitlines():
        code = line.partition(" loc(")[0].strip()
        if counter := re.match(r"(?:%[\w:#]+ = )?scf\.for (%\w+) = .* : i32", code):
            counters.add(counter[1])
            continue
        assigned = re.match(r"(%\w+) = ([\w.]+) ?(.*)$", code)
        if not assigned:
            continue
        result, op, rest = assigned.groups()
        operands = set(re.findall(r"%\w+", rest))
        # Branches beside each other use the same names
        ids.discard(result)
        counters.discard(result)
        if op == "tt.get_program_id":
            ids.add(result)
            continue
        if op == "arith.remsi" and operands & (ids | counters):
            counters.add(result)
            continue
        derived = ids if ids & operands else counters
        if not derived & operands or op in ("arith.extsi", "arith.cmpi"):
            continue
        harmless = sizes if derived is ids else constants.keys()
        if op == "arith.muli" and not harmless & operands:
            found.append(code)
        elif op == "tt.addptr" and derived is ids:
            found.append(code)
        elif "i32" in rest.rpartition(" : ")[2]:
            derived.add(result)
    return found
