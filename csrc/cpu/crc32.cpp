// A message is a polynomial over GF(2), its checksum the remainder by P. Replacing 128 bits of it by their product with
// x^d mod P, d bits further on, keeps the remainder ("Fast CRC computation for generic polynomials using PCLMULQDQ",
// Gopal and others, 2009). So a long message folds onto its last 16 bytes, and a table does those. Bits are reflected:
// the lowest bit of a byte is the highest power of x.
#include "crc32.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#ifdef PYSHARD_X86
#include <immintrin.h>
#endif

namespace pyshard {
namespace {

constexpr uint32_t kPolynomial = 0xEDB88320;  // reflected

constexpr std::array<uint32_t, 256> make_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) ? kPolynomial : 0);
    table[byte] = value;
  }
  return table;
}
constexpr auto kTable = make_table();

// The register after n bytes more; neither end is inverted.
uint32_t by_table(const uint8_t* data, size_t n, uint32_t state) {
  for (size_t i = 0; i < n; ++i) state = (state >> 8) ^ kTable[(state ^ data[i]) & 255];
  return state;
}

#ifdef PYSHARD_X86

// x^power mod P as the multiplier of a 64-bit half: a product of reflected numbers is one bit off, hence the shift.
constexpr int64_t multiplier(int power) {
  uint32_t value = 0x80000000;  // x^0
  for (int i = 0; i < power; ++i) value = (value >> 1) ^ ((value & 1) ? kPolynomial : 0);
  return static_cast<int64_t>(static_cast<uint64_t>(value) << 1);
}

// For the two halves of what moves on by so many bits. The first half lies 64 bits before the second, and a half's
// own 32 bits of remainder are accounted for.
template <int bits>
struct Fold {
  static constexpr int64_t first = multiplier(bits + 32), second = multiplier(bits - 32);
};

__attribute__((target("pclmul,sse4.1"))) inline __m128i fold(__m128i value, __m128i by, __m128i next) {
  return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(value, by, 0x00), _mm_clmulepi64_si128(value, by, 0x11)),
                       next);
}

// Folds blocks of 16 bytes onto the last one, and does that one and what is left after it.
__attribute__((target("pclmul,sse4.1"))) uint32_t finish(const __m128i* blocks, int count, const uint8_t* rest,
                                                         size_t n) {
  const __m128i by = _mm_set_epi64x(Fold<128>::second, Fold<128>::first);
  __m128i value = blocks[0];
  for (int i = 1; i < count; ++i) value = fold(value, by, blocks[i]);
  for (; n >= 16; rest += 16, n -= 16) value = fold(value, by, _mm_loadu_si128(reinterpret_cast<const __m128i*>(rest)));
  alignas(16) uint8_t last[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(last), value);
  return by_table(rest, n, by_table(last, 16, 0));
}

__attribute__((target("pclmul,sse4.1"))) uint32_t by_pclmul(const uint8_t* data, size_t n, uint32_t state) {
  constexpr int kWide = 8;  // independent chains, for the latency of a multiplication
  if (n < 16 * kWide) return by_table(data, n, state);
  __m128i values[kWide];
  for (int i = 0; i < kWide; ++i) values[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data) + i);
  values[0] = _mm_xor_si128(values[0], _mm_cvtsi32_si128(static_cast<int>(state)));
  const __m128i by = _mm_set_epi64x(Fold<128 * kWide>::second, Fold<128 * kWide>::first);
  for (data += 16 * kWide, n -= 16 * kWide; n >= 16 * kWide; data += 16 * kWide, n -= 16 * kWide)
    for (int i = 0; i < kWide; ++i)
      values[i] = fold(values[i], by, _mm_loadu_si128(reinterpret_cast<const __m128i*>(data) + i));
  return finish(values, kWide, data, n);
}

__attribute__((target("avx512f,vpclmulqdq,pclmul,sse4.1"))) uint32_t by_vpclmul(const uint8_t* data, size_t n,
                                                                                uint32_t state) {
  constexpr int kWide = 8;
  if (n < 64 * kWide) return by_pclmul(data, n, state);
  __m512i values[kWide];
  for (int i = 0; i < kWide; ++i) values[i] = _mm512_loadu_si512(data + 64 * i);
  values[0] = _mm512_xor_si512(values[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(state))));
  constexpr int64_t first = Fold<512 * kWide>::first, second = Fold<512 * kWide>::second;
  const __m512i by = _mm512_set_epi64(second, first, second, first, second, first, second, first);
  for (data += 64 * kWide, n -= 64 * kWide; n >= 64 * kWide; data += 64 * kWide, n -= 64 * kWide)
    for (int i = 0; i < kWide; ++i)
      values[i] = _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(values[i], by, 0x00),
                                            _mm512_clmulepi64_epi128(values[i], by, 0x11),
                                            _mm512_loadu_si512(data + 64 * i), 0x96);  // a ^ b ^ c
  alignas(64) __m128i blocks[4 * kWide];
  for (int i = 0; i < kWide; ++i) _mm512_store_si512(blocks + 4 * i, values[i]);
  return finish(blocks, 4 * kWide, data, n);
}

#endif

using Update = uint32_t (*)(const uint8_t*, size_t, uint32_t);

struct Kind {
  const char* name;
  Update update;
};

Kind kind_of(const std::string& most) {
#ifdef PYSHARD_X86
  __builtin_cpu_init();
  const bool narrow = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  if (narrow && most == "vpclmul" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq"))
    return {"vpclmul", by_vpclmul};
  if (narrow && most != "table") return {"pclmul", by_pclmul};
#endif
  (void)most;
  return {"table", by_table};
}

const Kind& best() {
  static const Kind kind = kind_of("vpclmul");
  return kind;
}

}  // namespace

const char* crc32_kind() { return best().name; }

uint32_t crc32(const void* data, size_t n, uint32_t value) {
  return ~best().update(static_cast<const uint8_t*>(data), n, ~value);
}

uint32_t crc32_by(const char* kind, const void* data, size_t n, uint32_t value) {
  return ~kind_of(kind).update(static_cast<const uint8_t*>(data), n, ~value);
}

uint32_t crc32_of_file(int file, int64_t begin, int64_t end) {
  constexpr int64_t kBuffer = 256 << 10;  // 128 KiB to 1 MiB are equally fast
  std::vector<uint8_t> buffer(static_cast<size_t>(std::clamp<int64_t>(end - begin, 0, kBuffer)));
  uint32_t value = 0;
  while (begin < end) {
    const ssize_t n = pread(file, buffer.data(), static_cast<size_t>(std::min(end - begin, kBuffer)), begin);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw std::system_error(errno, std::generic_category(), "pread");
    if (n == 0) throw std::runtime_error("the file became shorter while it was read");
    value = crc32(buffer.data(), static_cast<size_t>(n), value);
    begin += n;
  }
  return value;
}

}  // namespace pyshard
