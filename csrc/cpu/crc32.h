// CRC-32 as zlib computes it, by carry-less multiplication.
#pragma once
#include <cstddef>
#include <cstdint>

namespace pyshard {

// What runs here: "vpclmul" (512 bits at a time), "pclmul" (128) or "table" (a byte at a time: zlib is faster).
const char* crc32_kind();

// The checksum of what came before, `value` (0 at the beginning), followed by n bytes.
uint32_t crc32(const void* data, size_t n, uint32_t value);

// The same by one of the kinds, for tests; one that this machine does not have is a table.
uint32_t crc32_by(const char* kind, const void* data, size_t n, uint32_t value);

// The checksum of the bytes [begin, end) of an open file, read through a buffer that stays in the cache.
// Throws std::runtime_error if the file ends before, std::system_error if it cannot be read.
uint32_t crc32_of_file(int file, int64_t begin, int64_t end);

}  // namespace pyshard
