"""Writes csrc/common/constants.h from nwfast/constants.py, for C++ and CUDA; the build needs nothing but the header."""

import runpy
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCE, HEADER = FOLDER.parent.parent / "nwfast" / "constants.py", FOLDER / "constants.h"

# C++ names of the numbers, and of the polynomials: a template's, its type's, that of the coefficients.
NUMBERS = {
    "kLn2": "LN2",
    "kHalfLog2E": "HALF_LOG2E",
    "kRoot": "ROOT",
    "kNegligibleFloat": "NEGLIGIBLE_FLOAT",
    "kNegligibleDouble": "NEGLIGIBLE_DOUBLE",
    "kTruncationFloat": "TRUNCATION_FLOAT",
    "kTruncationDouble": "TRUNCATION_DOUBLE",
    "kAcceptFloat": "ACCEPT_FLOAT",
    "kAcceptDouble": "ACCEPT_DOUBLE",
    "kChoicePairs": "CHOICE_PAIRS",
}
POLYNOMIALS = (
    ("Exp2Floor", "float", "float", "EXP2_FLOOR_FLOAT"),
    ("Exp2Floor", "double", "double", "EXP2_FLOOR_DOUBLE"),
    ("Exp2Round", "float", "double", "EXP2_ROUND_SINGLE_SUMS"),
    ("Exp2Round", "double", "double", "EXP2_ROUND_DOUBLE"),
)


def header() -> str:
    """The text of csrc/common/constants.h; numbers in hexadecimal, so that they are the same to the bit."""
    constants = runpy.run_path(str(SOURCE))
    lines = [
        "// Written by write_constants.py from nwfast/constants.py, where the numbers are explained and changed.",
        "",
        "#pragma once",
        "",
        '#include "host_device.h"',
        "",
        "// clang-format off",
        "namespace nwfast {",
        "",
    ]
    lines += [
        f"constexpr double {name} = {float(constants[source]).hex()};  // {constants[source]!r}"
        for name, source in NUMBERS.items()
    ]
    for template in dict.fromkeys(polynomial[0] for polynomial in POLYNOMIALS):
        lines += ["", "template <typename T>", f"struct {template};"]
    # A function gives the coefficients, since device code cannot index a static member.
    for template, name, dtype, source in POLYNOMIALS:
        suffix = "f" if dtype == "float" else ""
        coefficients = ", ".join(c.hex() + suffix for c in constants[source])
        lines += [
            "template <>",
            f"struct {template}<{name}> {{  // {source}",
            f"  static constexpr int kDegree = {len(constants[source]) - 1};",
            f"  static NWFAST_HOST_DEVICE constexpr {dtype} coefficient(int i) {{",
            f"    constexpr {dtype} kCoefficients[kDegree + 1] = {{{coefficients}}};",
            "    return kCoefficients[i];",
            "  }",
            "};",
        ]
    lines += ["", "}  // namespace nwfast", "// clang-format on", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    HEADER.write_text(header())
