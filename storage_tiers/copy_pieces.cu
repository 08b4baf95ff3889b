// Copies many pieces of memory, equally long, each from its source to its target. Either side may be
// the GPU's own memory or host memory that is pinned and mapped. No piece may overlap another's target.
//
// A warp takes a part of a piece at a time. Its lanes lie side by side, so a warp's access is 512
// contiguous bytes, and it starts UNROLL loads before the first store: over PCIe what counts is how
// many bytes are on their way. Loads and stores ask to be evicted first, so that the engine's data
// stays in the L2 cache. There is no shared memory and no barrier, so few resources are taken, and
// the same source runs thread by thread on a CPU, which is how its arithmetic is tested.

struct Piece {
  unsigned long long target, source;  // addresses; both multiples of the unit
};

constexpr unsigned WARP = 32;
constexpr unsigned UNROLL = 4;
constexpr unsigned PART = 4 * UNROLL * WARP;  // units; 8 KiB of the larger unit

template <typename Unit>
static __device__ void copy(const Piece* pieces, unsigned count, unsigned size) {
  const unsigned lane = threadIdx.x % WARP;
  const unsigned parts = size / PART + (size % PART != 0);
  const unsigned long long tasks = (unsigned long long)count * parts;
  const unsigned long long warps = (unsigned long long)gridDim.x * blockDim.x / WARP;
  const unsigned long long first = ((unsigned long long)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
  for (unsigned long long task = first; task < tasks; task += warps) {
    const Piece piece = pieces[task / parts];
    const unsigned begin = (unsigned)(task % parts) * PART;
    const unsigned end = size - begin > PART ? begin + PART : size;
    const Unit* source = (const Unit*)piece.source;
    Unit* target = (Unit*)piece.target;
    for (unsigned at = begin + lane; at < end; at += UNROLL * WARP) {
      Unit units[UNROLL];
#pragma unroll
      for (unsigned step = 0; step < UNROLL; step++)
        if (at + step * WARP < end) units[step] = __ldcs(source + at + step * WARP);
#pragma unroll
      for (unsigned step = 0; step < UNROLL; step++)
        if (at + step * WARP < end) __stcs(target + at + step * WARP, units[step]);
    }
  }
}

// `size` counts units of 16 bytes. A block must have whole warps of threads.
extern "C" __global__ void copy_pieces_16(const Piece* pieces, unsigned count, unsigned size) {
  copy<uint4>(pieces, count, size);
}

// For what is not aligned to 16 bytes; `size` in bytes.
extern "C" __global__ void copy_pieces_1(const Piece* pieces, unsigned count, unsigned size) {
  copy<unsigned char>(pieces, count, size);
}
