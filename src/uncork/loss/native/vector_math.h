// Elementary functions: for float without branches and library calls, so that compilers vectorise them; for double
// those of the standard library. -inf, +inf, NaN and denormal results are right. Everything has internal linkage, since
// this file is compiled once for each instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

inline float from_bits(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int32_t to_bits(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Relative error below 2e-7: 2^k e^r with |r| <= log(2) / 2, e^r by a minimax polynomial.
inline float exp_(float x) {
  x = x < -104.0f ? -104.0f : x;  // NaN passes both
  x = x > 89.0f ? 89.0f : x;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, which its low bits then hold
  const float shifted = x * 1.44269504f + shift;
  const float whole = shifted - shift;
  // log 2 in two parts, the first of few enough bits that whole times it is exact
  const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float q = 0.001395053812302649f;
  q = q * r + 0.008368917740881443f;
  q = q * r + 0.04166620597243309f;
  q = q * r + 0.166665181517601f;
  q = q * r + 0.5f;
  const float power = (q * (r * r) + r) + 1.0f;
  // 2^k in two factors: k reaches from -150, where the result is a denormal or 0, to 128, where it is inf. Unsigned, since
  // the bits of a NaN may be anything.
  const int32_t k = static_cast<int32_t>(static_cast<uint32_t>(to_bits(shifted)) - static_cast<uint32_t>(to_bits(shift)));
  const int32_t half = k >> 1;
  const auto factor = [](int32_t n) { return from_bits(static_cast<int32_t>(static_cast<uint32_t>(n + 127) << 23)); };
  return power * factor(half) * factor(k - half);
}
inline double exp_(double x) { return std::exp(x); }

// log(1 + e) for e in [0, 1], as 2 atanh(e / (2 + e)).
inline float log1p_(float e) {
  const float s = e / (2.0f + e), q = s * s;
  float p = 0.24300937354564667f;
  p = p * q + 0.21427656710147858f;
  p = p * q + 0.2861688435077667f;
  p = p * q + 0.3999887704849243f;
  p = p * q + 0.6666667461395264f;
  return 2.0f * s + (s * q) * p;
}
inline double log1p_(double e) { return std::log1p(e); }

// log of a number of at least 1.
inline float log_(float x) {
  const int32_t bits = to_bits(x), exponent = (bits >> 23) - 127;
  const float mantissa = from_bits((bits & 0x007fffff) | 0x3f800000);  // in [1, 2)
  const float found = static_cast<float>(exponent) * 0.69314718f + log1p_(mantissa - 1.0f);
  return x == x ? found : x;
}
inline double log_(double x) { return std::log(x); }

template <class T>
inline T abs_(T x) {
  return x < T(0) ? -x : x;
}

inline float tanh_(float u) {
  const float a = abs_(u), e = exp_(-2.0f * a), q = u * u;
  float p = -0.00590586056932807f;
  p = p * q + 0.020805377513170242f;
  p = p * q - 0.05378668010234833f;
  p = p * q + 0.13331958651542664f;
  p = p * q - 0.33333298563957214f;
  const float small = u + (u * q) * p, large = (1.0f - e) / (1.0f + e);
  return a < 0.6f ? small : (u < 0.0f ? -large : large);
}
inline double tanh_(double u) { return std::tanh(u); }

// 1 - tanh(u)^2, without the loss of digits where it is small.
template <class T>
inline T sech2_(T u) {
  const T e = exp_(T(-2) * abs_(u)), one = T(1) + e;
  return T(4) * e / (one * one);
}

template <class T>
inline T sigmoid_(T u) {
  const T e = exp_(-abs_(u)), other = T(1) / (T(1) + e);
  return u < T(0) ? e * other : other;
}

template <class T>
inline T log_sigmoid_(T u) {
  return (u < T(0) ? u : T(0)) - log1p_(exp_(-abs_(u)));
}

}  // namespace
