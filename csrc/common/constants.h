// Written by write_constants.py from nwfast/constants.py, where the numbers are explained and changed.

#pragma once

#include "host_device.h"

// clang-format off
namespace nwfast {

constexpr double kLn2 = 0x1.62e42fefa39efp-1;  // 0.6931471805599453
constexpr double kHalfLog2E = 0x1.71547652b82fep-1;  // 0.7213475204444817
constexpr double kRoot = 0x1.b2da4e9808a53p-1;  // 0.8493218002880191
constexpr double kNegligibleFloat = 0x1.b000000000000p+4;  // 27.0
constexpr double kNegligibleDouble = 0x1.c800000000000p+5;  // 57.0
constexpr double kTruncationFloat = 0x1.12e0be826d695p-30;  // 1e-09
constexpr double kTruncationDouble = 0x1.203af9ee75616p-49;  // 2e-15
constexpr double kAcceptFloat = 0x1.5798ee2308c3ap-26;  // 2e-08
constexpr double kAcceptDouble = 0x1.c25c268497682p-44;  // 1e-13
constexpr double kChoicePairs = 0x1.0000000000000p+16;  // 65536

template <typename T>
struct Exp2Floor;

template <typename T>
struct Exp2Round;
template <>
struct Exp2Floor<float> {  // EXP2_FLOOR_FLOAT
  static constexpr int kDegree = 5;
  static NWFAST_HOST_DEVICE constexpr float coefficient(int i) {
    constexpr float kCoefficients[kDegree + 1] = {0x1.0000000000000p+0f, 0x1.62e4ba0000000p-1f, 0x1.ebdb580000000p-3f, 0x1.c91ce80000000p-5f, 0x1.2778560000000p-7f, 0x1.e974fe0000000p-10f};
    return kCoefficients[i];
  }
};
template <>
struct Exp2Floor<double> {  // EXP2_FLOOR_DOUBLE
  static constexpr int kDegree = 11;
  static NWFAST_HOST_DEVICE constexpr double coefficient(int i) {
    constexpr double kCoefficients[kDegree + 1] = {0x1.0000000000000p+0, 0x1.62e42fefa39f5p-1, 0x1.ebfbdff82c04bp-3, 0x1.c6b08d706583ap-5, 0x1.3b2ab6f734125p-7, 0x1.5d87ff4d22fcdp-10, 0x1.4308fa1dc4cf4p-13, 0x1.ffcfc6ab0e62cp-17, 0x1.628f357811bdbp-20, 0x1.b85f4350c7630p-24, 0x1.c2c475d05242ap-28, 0x1.5856730abf6f5p-31};
    return kCoefficients[i];
  }
};
template <>
struct Exp2Round<float> {  // EXP2_ROUND_SINGLE_SUMS
  static constexpr int kDegree = 6;
  static NWFAST_HOST_DEVICE constexpr double coefficient(int i) {
    constexpr double kCoefficients[kDegree + 1] = {0x1.0000000000000p+0, 0x1.62e4302fc626ep-1, 0x1.ebfbe00e63baep-3, 0x1.c6af6cdbbdcc7p-5, 0x1.3b2a53045179ap-7, 0x1.5f0890162a90ap-10, 0x1.4413896e1ad27p-13};
    return kCoefficients[i];
  }
};
template <>
struct Exp2Round<double> {  // EXP2_ROUND_DOUBLE
  static constexpr int kDegree = 11;
  static NWFAST_HOST_DEVICE constexpr double coefficient(int i) {
    constexpr double kCoefficients[kDegree + 1] = {0x1.0000000000000p+0, 0x1.62e42fefa39efp-1, 0x1.ebfbdff82c598p-3, 0x1.c6b08d704a0c2p-5, 0x1.3b2ab6fba1ddap-7, 0x1.5d87fe78a5276p-10, 0x1.430913096fd9fp-13, 0x1.ffcbfc670dcd4p-17, 0x1.62bfd47773353p-20, 0x1.b524fae627834p-24, 0x1.e6063f7217bc6p-28, 0x1.e9d3fe3952179p-32};
    return kCoefficients[i];
  }
};

}  // namespace nwfast
// clang-format on
