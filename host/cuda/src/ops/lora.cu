// LoRA's narrow products, in which one matrix is wide and read once: u = x·Aᵀ; v = dy·sB together with dB = uᵀ·dy; dA = vᵀ·x. RANK,
// a multiple of 8, is that of all adapters of a stack.
//
// A block has some columns of the wide matrix and a range of its tokens. Of u or v it has a part of every sum over columns, of a
// gradient one of every sum over tokens. The parts are written in f32, and two small kernels add them in their order, so that two
// runs are equal bit for bit.

#define WARPS 8
#ifndef TOKENS
#define TOKENS 16  // of a step
#endif
#define RANKS (RANK / 8)
#define COLUMNS (RANK <= 32 ? 64 : 32)  // of a warp: more would not fit into its registers
#define WIDTH (WARPS * COLUMNS)
#ifndef STAGES
#define STAGES 3
#endif
#define WIDE_BYTES (TOKENS * WIDTH * 2)
#define NARROW_BYTES (TOKENS * RANK * 2)
#define STAGE_BYTES (WIDE_BYTES + NARROW_BYTES)
#define SUMS (WARPS * TOKENS * RANK)  // a warp's sums over its columns, for all warps; there are two such places

struct Narrow {
    View wide;                       // [tokens, columns]
    View factor;                     // what u or v is a product with: A [rank, columns], or sB [columns, rank]
    View narrow;                     // u or v, [tokens, rank], for the gradient
    float *projected, *gradients;    // parts: [blocks of columns, tokens, rank], [ranges, rank, columns]
    int tokens, columns, range;      // range: tokens of a block, a multiple of TOKENS
};

// Where a row's eight columns lie in a tile of the wide matrix: eight rows fall into different banks.
__device__ __forceinline__ u32 place_of(int row, int chunk) { return row * (WIDTH * 2) + (chunk ^ row % 8) * 16; }

// Two values of a lane's column of a fragment of the factor: rows are columns of the wide matrix.
template <bool TRANSPOSED>
__device__ __forceinline__ u32 load_factor(const Narrow& p, int column, int rank) {
    if (column >= p.columns) return 0;
    if (TRANSPOSED) return *(const u32*)(row(p.factor, rank) + column);
    return row(p.factor, column)[rank] | (u32)row(p.factor, column + 1)[rank] << 16;
}

template <bool PROJECT, bool GRADIENT, bool TRANSPOSED>
__device__ __forceinline__ void narrow_products(const Narrow& p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    float* sums = (float*)(memory + STAGES * STAGE_BYTES);
    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    int first_column = blockIdx.x * WIDTH, own = first_column + warp * COLUMNS;
    int begin = blockIdx.y * p.range, end = min(begin + p.range, p.tokens), steps = (end - begin + TOKENS - 1) / TOKENS;

    auto load = [&](int step) {
        if (step < steps) {
            u32 to = shared_address(memory) + step % STAGES * STAGE_BYTES;
            int token = begin + step * TOKENS, chunk = thread % COLUMNS, column = first_column + chunk * 8;
#pragma unroll
            for (int r = thread / COLUMNS; r < TOKENS; r += WARPS * 32 / COLUMNS) {
                bool inside = token + r < end && column < p.columns;
                copy_async(to + place_of(r, chunk), row(p.wide, token + r) + column, inside);
            }
            if (GRADIENT && thread < TOKENS * RANKS) {
                int r = thread / RANKS, c = thread % RANKS;
                copy_async(to + WIDE_BYTES + thread * 16, row(p.narrow, token + r) + c * 8, token + r < end);
            }
        }
        commit_copies();
    };
    // Adds what the warps have of a step, in their order.
    auto write_projected = [&](int step) {
        const float* from = sums + step % 2 * SUMS;
        for (int i = thread; i < TOKENS * RANK; i += WARPS * 32) {
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += from[w * TOKENS * RANK + i];
            // Sums lie as the lanes have them: of a fragment a lane has two columns in each of two rows.
            int fragment = i / 128, of = i % 128 / 4, token = begin + step * TOKENS + of / 4 + i % 4 / 2 * 8;
            long long at = ((long long)blockIdx.x * p.tokens + token) * RANK + fragment * 8 + of % 4 * 2 + i % 2;
            if (token < end) p.projected[at] = sum;
        }
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) load(i);

    u32 factor[COLUMNS / 16][RANKS][2];
    if (PROJECT) {
#pragma unroll
        for (int c = 0; c < COLUMNS / 16; c++) {
#pragma unroll
            for (int f = 0; f < RANKS; f++) {
                int column = own + c * 16 + lane % 4 * 2, rank = f * 8 + lane / 4;
                factor[c][f][0] = load_factor<TRANSPOSED>(p, column, rank);
                factor[c][f][1] = load_factor<TRANSPOSED>(p, column + 8, rank);
            }
        }
    }
    float gradient[COLUMNS / 16][RANKS][4] = {};

    for (int step = 0; step < steps; step++) {
        copies_done<STAGES - 2>();
        __syncthreads();
        load(step + STAGES - 1);
        if (PROJECT && step > 0) write_projected(step - 1);
        u32 wide = shared_address(memory) + step % STAGES * STAGE_BYTES;
        if (PROJECT) {
            float projected[RANKS][4] = {};
#pragma unroll
            for (int c = 0; c < COLUMNS / 16; c++) {
                u32 tile[4];
                ldmatrix(tile, wide + place_of(lane % 16, warp * (COLUMNS / 8) + c * 2 + lane / 16));
#pragma unroll
                for (int f = 0; f < RANKS; f++) mma(projected[f], tile, factor[c][f]);
            }
            float4* to = (float4*)(sums + step % 2 * SUMS + warp * TOKENS * RANK) + lane;
#pragma unroll
            for (int f = 0; f < RANKS; f++) {
                to[f * 32] = make_float4(projected[f][0], projected[f][1], projected[f][2], projected[f][3]);
            }
        }
        if (GRADIENT) {
            u32 narrow[RANKS + 1][2];
#pragma unroll
            for (int f = 0; f < RANKS; f += 2) {
                u32 both[4];
                int column = min(f + lane / 16, RANKS - 1);
                ldmatrix_transposed(both, wide + WIDE_BYTES + (lane % 16 * RANKS + column) * 16);
                narrow[f][0] = both[0], narrow[f][1] = both[1], narrow[f + 1][0] = both[2], narrow[f + 1][1] = both[3];
            }
#pragma unroll
            for (int c = 0; c < COLUMNS / 16; c++) {
                u32 tile[4];
                ldmatrix_transposed(tile, wide + place_of(lane % 8 + lane / 16 * 8, warp * (COLUMNS / 8) + c * 2 + lane / 8 % 2));
#pragma unroll
                for (int f = 0; f < RANKS; f++) mma(gradient[c][f], tile, narrow[f]);
            }
        }
    }
    if (PROJECT && steps > 0) {
        __syncthreads();
        write_projected(steps - 1);
    }
    if (GRADIENT) {
        float* to = p.gradients + (long long)blockIdx.y * RANK * p.columns;
#pragma unroll
        for (int c = 0; c < COLUMNS / 16; c++) {
#pragma unroll
            for (int f = 0; f < RANKS; f++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int column = own + c * 16 + lane / 4 + i / 2 * 8, rank = f * 8 + lane % 4 * 2 + i % 2;
                    if (column < p.columns) to[(long long)rank * p.columns + column] = gradient[c][f][i];
                }
            }
        }
    }
}

// u = x·Aᵀ.
extern "C" __global__ void __launch_bounds__(WARPS * 32, RANK > 24 ? 1 : 2) lora_u(Narrow p) { narrow_products<true, false, true>(p); }

// v = dy·sB, dB = uᵀ·dy.
extern "C" __global__ void __launch_bounds__(WARPS * 32, RANK > 24 ? 1 : 2) lora_vjp_b(Narrow p) { narrow_products<true, true, false>(p); }

// dA = vᵀ·x.
extern "C" __global__ void __launch_bounds__(WARPS * 32, RANK > 24 ? 1 : 2) lora_vjp_a(Narrow p) { narrow_products<false, true, false>(p); }

// Adds the parts of u or v: a thread has two columns.
extern "C" __global__ void lora_sum(const float* parts, int count, View to, int tokens) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= tokens * (RANK / 2)) return;
    float2 sum = {};
#pragma unroll 8
    for (int part = 0; part < count; part++) {
        float2 add = ((const float2*)parts)[(long long)part * tokens * (RANK / 2) + i];
        sum.x += add.x, sum.y += add.y;
    }
    *(u32*)(row(to, i / (RANK / 2)) + i % (RANK / 2) * 2) = pack(sum.x, sum.y);
}

// Parts of a gradient, and what they are added to.
struct Parts {
    const float* parts;
    float* to;
    int count, values;
};

// Adds the parts of both gradients to what those were: a thread has one value.
extern "C" __global__ void lora_add(Parts a, Parts b) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    Parts& p = i < a.values ? a : b;
    if (i >= a.values) i -= a.values;
    if (i >= p.values) return;
    float sum = 0.f;
#pragma unroll 16
    for (int part = 0; part < p.count; part++) sum += p.parts[(long long)part * p.values + i];
    p.to[i] += sum;
}
