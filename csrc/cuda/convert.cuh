// The bodies of casts, split and join: dst[i] = convert(src[i]).
#pragma once

#include "quads.cuh"

namespace pyshard {

// Four quads per thread, all loaded before the first is stored: with 8 bytes each they are the only loads under way.
constexpr int kConvertQuads = 4;
constexpr int64_t kConvertBlock = kConvertQuads * kQuadStride;

PYSHARD_HD int64_t convert_blocks(int64_t n) { return (n + kConvertBlock - 1) / kConvertBlock; }

struct CastArgs {
  const void* src;  // [n]
  void* dst;        // [n]
  Dtype from, to;   // exactly one is fp32
  int64_t n;

  int64_t blocks() const { return convert_blocks(n); }
};

struct SplitArgs {
  const float* master;  // [n]
  uint16_t* high;       // [n] bf16 bits
  int16_t* low;         // [n]
  int64_t n;

  int64_t blocks() const { return convert_blocks(n); }
};

struct JoinArgs {
  const uint16_t* high;  // [n] bf16 bits
  const int16_t* low;    // [n]
  float* master;         // [n]
  int64_t n;

  int64_t blocks() const { return convert_blocks(n); }
};

template <int32_t kFrom, int32_t kTo>
struct CastQuad {
  using From = typename Element<kFrom>::Type;
  using To = typename Element<kTo>::Type;
  Quad<From> x;

  PYSHARD_HD bool aligned(const CastArgs& a) { return aligned16(a.src) && aligned16(a.dst); }

  template <bool kVector>
  PYSHARD_HD CastQuad read(const CastArgs& a, int64_t i) {
    CastQuad q;
    q.x = load<kVector>(static_cast<const From*>(a.src), i, a.n);
    return q;
  }

  template <bool kVector>
  PYSHARD_HD void write(const CastQuad& q, const CastArgs& a, int64_t i) {
    Quad<To> y;
    PYSHARD_UNROLL
    for (int j = 0; j < 4; ++j) y.at[j] = Element<kTo>::encode(Element<kFrom>::decode(q.x.at[j]));
    store<kVector>(static_cast<To*>(a.dst), i, a.n, y);
  }
};

struct SplitQuad {
  Quad<float> master;

  PYSHARD_HD bool aligned(const SplitArgs& a) { return aligned16(a.master) && aligned16(a.high) && aligned16(a.low); }

  template <bool kVector>
  PYSHARD_HD SplitQuad read(const SplitArgs& a, int64_t i) {
    SplitQuad q;
    q.master = load<kVector>(a.master, i, a.n);
    return q;
  }

  template <bool kVector>
  PYSHARD_HD void write(const SplitQuad& q, const SplitArgs& a, int64_t i) {
    Quad<uint16_t> high;
    Quad<int16_t> low;
    PYSHARD_UNROLL
    for (int j = 0; j < 4; ++j) {
      const Split parts = split_master(q.master.at[j]);
      high.at[j] = parts.high;
      low.at[j] = parts.low;
    }
    store<kVector>(a.high, i, a.n, high);
    store<kVector>(a.low, i, a.n, low);
  }
};

struct JoinQuad {
  Quad<uint16_t> high;
  Quad<int16_t> low;

  PYSHARD_HD bool aligned(const JoinArgs& a) { return aligned16(a.high) && aligned16(a.low) && aligned16(a.master); }

  template <bool kVector>
  PYSHARD_HD JoinQuad read(const JoinArgs& a, int64_t i) {
    JoinQuad q;
    q.high = load<kVector>(a.high, i, a.n);
    q.low = load<kVector>(a.low, i, a.n);
    return q;
  }

  template <bool kVector>
  PYSHARD_HD void write(const JoinQuad& q, const JoinArgs& a, int64_t i) {
    Quad<float> master;
    PYSHARD_UNROLL
    for (int j = 0; j < 4; ++j) master.at[j] = join_master(q.high.at[j], q.low.at[j]);
    store<kVector>(a.master, i, a.n, master);
  }
};

template <class Q, class Args>
PYSHARD_HD void convert_block(const Args& args, int64_t block, int thread) {
  const bool aligned = Q::aligned(args);
  const int64_t start = block * kConvertBlock, end = start + kConvertBlock;
  if (aligned && end <= args.n) {
    Q quads[kConvertQuads];
    PYSHARD_UNROLL
    for (int k = 0; k < kConvertQuads; ++k)
      quads[k] = Q::template read<true>(args, start + 4 * thread + k * kQuadStride);
    PYSHARD_UNROLL
    for (int k = 0; k < kConvertQuads; ++k)
      Q::template write<true>(quads[k], args, start + 4 * thread + k * kQuadStride);
    return;
  }
  PYSHARD_NO_UNROLL
  for (int64_t i = start + 4 * thread; i < end && i < args.n; i += kQuadStride) {
    if (aligned && i + 4 <= args.n)
      Q::template write<true>(Q::template read<true>(args, i), args, i);
    else
      Q::template write<false>(Q::template read<false>(args, i), args, i);
  }
}

PYSHARD_HD void cast_body(const CastArgs& args, int64_t block, int thread) {
  if (args.to == kBfloat16) return convert_block<CastQuad<kFloat32, kBfloat16>>(args, block, thread);
  if (args.to == kFloat16) return convert_block<CastQuad<kFloat32, kFloat16>>(args, block, thread);
  if (args.from == kBfloat16) return convert_block<CastQuad<kBfloat16, kFloat32>>(args, block, thread);
  convert_block<CastQuad<kFloat16, kFloat32>>(args, block, thread);
}

PYSHARD_HD void split_body(const SplitArgs& args, int64_t block, int thread) {
  convert_block<SplitQuad>(args, block, thread);
}

PYSHARD_HD void join_body(const JoinArgs& args, int64_t block, int thread) {
  convert_block<JoinQuad>(args, block, thread);
}

}  // namespace pyshard
