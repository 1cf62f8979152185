"""The numbers that all kernels share: the one source from which C++, CUDA, Numba and Triton take theirs.

Triton has an exp2 of the device. So do CUDA's float32 kernels, but for a share of the powers of the single forward
kernel (EXP2_FLOOR_FLOAT); CUDA in double takes EXP2_FLOOR_DOUBLE.

``python csrc/common/write_constants.py`` writes csrc/common/constants.h from it (`make format` does so); a test
compares the two and measures every polynomial. Nothing is imported here, so that the header can be written without
torch.
"""

LN2 = 0.69314718055994530942
HALF_LOG2E = 0.72134752044448170368  # base-2 scores are -HALF_LOG2E (w d)^2
ROOT = 0.84932180028801904272  # its square root: with w times this, base-2 scores are -(w d)^2

# Coefficients c_0, c_1, ... of polynomials p(f) for 2^f. All have c_0 = 1, so that equal scores weigh exactly 1: w = 0
# is average pooling. Minimax in the relative error (Remez's algorithm; interpolation at Chebyshev nodes, where that is
# as good), those for float32 with coefficients that float32 holds, found by a search.

# For f in [0, 1): 2^x = 2^floor(x) p(x - floor(x)).
EXP2_FLOOR_FLOAT = (
    1.0,
    0.6931512951850891,
    0.24016445875167847,
    0.05579991638660431,
    0.009017030708491802,
    0.0018671302823349833,
)
EXP2_FLOOR_DOUBLE = (
    1.0,
    0.69314718055994592842,
    0.24022650695906330204,
    0.055504108665602253297,
    0.0096181290995507955717,
    0.0013333558629566755226,
    0.00015403512309628660399,
    0.000015253175055562795993,
    1.3208367288951140366e-6,
    1.0253212435721934234e-7,
    6.559529322770528367e-9,
    6.2634661462900210149e-10,
)
# For f in [-1/2, 1/2]: 2^x = 2^round(x) p(x - round(x)).
EXP2_ROUND_SINGLE_SUMS = (  # for sums in double that make a float32
    1.0,
    0.69314718802622878106,
    0.24022650760568126945,
    0.055503571142190778186,
    0.0096180825572778514913,
    0.0013390863364671234381,
    0.00015453162945120690177,
)
EXP2_ROUND_DOUBLE = (
    1.0,
    0.69314718055994530942,
    0.2402265069591009822,
    0.055504108664821594339,
    0.0096181291076068885273,
    0.001333355814641693531,
    0.00015403530441736050155,
    0.000015252733829836118394,
    1.3215442587921689653e-6,
    1.0178062445845773521e-7,
    7.0725859492692236999e-9,
    4.4549605981865183938e-10,
)
# The largest relative errors of the polynomials.
EXP2_ERRORS = {
    "EXP2_FLOOR_FLOAT": 8.7e-8,
    "EXP2_FLOOR_DOUBLE": 2e-17,
    "EXP2_ROUND_SINGLE_SUMS": 5.1e-9,
    "EXP2_ROUND_DOUBLE": 2e-17,
}

# A weight of 2^-NEGLIGIBLE relative to the largest one, divided by the number of keys, is below the rounding error.
NEGLIGIBLE_FLOAT, NEGLIGIBLE_DOUBLE = 27.0, 57.0

# Linear time, by the precision of the data. TRUNCATION: error of expansions, relative to the mass of a box. ACCEPT:
# error bound of a row's total beyond which the row is summed with care.
TRUNCATION_FLOAT, TRUNCATION_DOUBLE = 1e-9, 2e-15
ACCEPT_FLOAT, ACCEPT_DOUBLE = 2e-8, 1e-13

# The choice between the dense and the linear method: with fewer pairs of a query and a key than so many the dense one
# is as fast as any, and the look at the data that the choice takes would cost more than it saves. That look takes
# longer where it is in Python (the Numba backend's).
CHOICE_PAIRS = 65_536
CHOICE_PAIRS_IN_PYTHON = 130_000
