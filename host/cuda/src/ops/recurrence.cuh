// What the kernels of recurrences with a state have in common: chunks of tokens, and tiles of them in shared memory for the tensor cores.
//
// A chunk is at most CHUNK rows of one example that follow on each other: of the prompt, or of one answer; a whole example where it is
// that short. Its tokens see each other by the rule of answers (`answer_mask.rs`), and before its first one lies the state that chunks
// before left.

#define CHUNK 64

extern __shared__ __align__(128) unsigned char shared[];

// How a chunk begins.
#define FROM_ZERO 0
#define FROM_PROMPT 1
#define FROM_BEFORE 2
#define FROM_TEXT 3

struct Chunk {
    // The batch's row of its first token, that token's place in the example, where the prompt ends there, its tokens, how it begins.
    int row, first, prompt, rows, from;
    // Where the states that it begins and ends with are kept; below 0 where nobody needs them.
    int enter, leave;
    int unused;
};

// An example: its first chunk, and how many there are.
struct Walk {
    int first, count;
};

// The address of eight columns in a tile with rows of COLUMNS: pieces of 16 bytes lie so that eight rows' are in different banks.
template <int COLUMNS>
__device__ __forceinline__ u32 tile_at(u32 tile, int row, int column) {
    constexpr int WIDTH = (COLUMNS + 63) / 64 * 128;
    return tile + row * WIDTH + (((column >> 3) ^ (row & 7)) << 4);
}

template <int COLUMNS>
__device__ constexpr int tile_bytes(int rows) { return rows * ((COLUMNS + 63) / 64 * 128); }

// Four 8 by 8 matrices of the 16 by 16 at (row, column), one under the other first: an operand A as it lies, or B transposed.
template <int COLUMNS>
__device__ __forceinline__ u32 tile_down(u32 tile, int row, int column) {
    int lane = threadIdx.x & 31;
    return tile_at<COLUMNS>(tile, row + (lane & 7) + ((lane >> 3) & 1) * 8, column + (lane >> 4) * 8);
}

// The same, one beside the other first: an operand B as it lies, or A transposed.
template <int COLUMNS>
__device__ __forceinline__ u32 tile_along(u32 tile, int row, int column) {
    int lane = threadIdx.x & 31;
    return tile_at<COLUMNS>(tile, row + (lane & 7) + (lane >> 4) * 8, column + ((lane >> 3) & 1) * 8);
}

// Starts copying so many rows of COLUMNS to a tile; rows of the tile beyond `inside` become zero.
template <int COLUMNS, int ROWS>
__device__ __forceinline__ void copy_tile(u32 tile, const bf16* from, long long ld, int inside) {
    constexpr int PIECES = COLUMNS / 8;
    for (int i = threadIdx.x; i < ROWS * PIECES; i += blockDim.x) {
        int row = i / PIECES, piece = i % PIECES;
        copy_async(tile_at<COLUMNS>(tile, row, piece * 8), from + (row < inside ? row : 0) * ld + piece * 8, row < inside);
    }
}

// An 8 by 8 matrix of which a lane has two columns of a row becomes one of which it has two rows of a column.
__device__ __forceinline__ u32 transposed(u32 x) {
    u32 out;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(x));
    return out;
}

__device__ __forceinline__ float low(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high(u32 x) { return __uint_as_float(x & 0xffff0000u); }
