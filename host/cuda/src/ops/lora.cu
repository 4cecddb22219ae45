// Gradients of LoRA's matrices, in two products of which each reads one wide matrix once: v = dy·sB together with dB = uᵀ·dy, then
// dA = vᵀ·x. RANK, a multiple of 8, is that of all adapters of a stack.
//
// A block has some columns of the wide matrix and a range of its tokens. Of v it has a part of every sum over columns, of a
// gradient one of every sum over tokens. The parts are written in f32, and two small kernels add them in their order, so that two
// runs are equal bit for bit.

#define WARPS 8
#define RANKS (RANK / 8)
#define STAGES 3

struct Narrow {
    View wide;                    // dy or x, [tokens, columns]
    View factor;                  // sB, [columns, rank], where v is computed
    View narrow;                  // u or v, [tokens, rank]
    float *projected, *gradient;  // parts: of v [blocks of columns, tokens, rank]; of a gradient [ranges, rank, columns]
    int tokens, columns, range;   // range: tokens of a block
};

// COLUMNS of a warp, as many as fit into its registers; TOKENS of a step. The tiles of a step, [TOKENS, WARPS * COLUMNS] and
// [TOKENS, RANK], lie one behind the other.
template <int COLUMNS, int TOKENS>
struct Tiles {
    static constexpr int WIDTH = WARPS * COLUMNS, WIDE = TOKENS * WIDTH * 2, BYTES = WIDE + TOKENS * RANK * 2;

    // Where a row's eight columns lie: eight rows fall into different banks.
    static __device__ __forceinline__ u32 place(int row, int chunk) { return row * (WIDTH * 2) + (chunk ^ row % 8) * 16; }
};

template <int COLUMNS, int TOKENS, bool PROJECT>
__device__ __forceinline__ void narrow_products(const Narrow& p) {
    using T = Tiles<COLUMNS, TOKENS>;
    constexpr int SUMS = WARPS * TOKENS * RANK;  // of every warp over its columns, for v
    static_assert(!PROJECT || TOKENS == 16, "v is summed for 16 tokens at a time");
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 stages = shared_address(memory);
    float* sums = (float*)(memory + STAGES * T::BYTES);  // of two steps
    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    int first_column = blockIdx.x * T::WIDTH, own = first_column + warp * COLUMNS;
    int begin = blockIdx.y * p.range, end = min(begin + p.range, p.tokens), steps = (end - begin + TOKENS - 1) / TOKENS;

    auto load = [&](int step) {
        if (step < steps) {
            constexpr int IN_ROW = T::WIDTH / 8;
            u32 to = stages + step % STAGES * T::BYTES;
            int token = begin + step * TOKENS, chunk = thread % IN_ROW, column = first_column + chunk * 8;
#pragma unroll
            for (int r = thread / IN_ROW; r < TOKENS; r += WARPS * 32 / IN_ROW) {
                copy_async(to + T::place(r, chunk), row(p.wide, token + r) + column, token + r < end && column < p.columns);
            }
            for (int i = thread; i < TOKENS * RANKS; i += WARPS * 32) {
                int r = i / RANKS;
                copy_async(to + T::WIDE + i * 16, row(p.narrow, token + r) + i % RANKS * 8, token + r < end);
            }
        }
        commit_copies();
    };
    // Adds what the warps have of a step of v, in their order.
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

    // Of sB, whose rows are dy's columns, a lane has two values one below the other.
    u32 factor[COLUMNS / 16][RANKS][2];
    if (PROJECT) {
#pragma unroll
        for (int i = 0; i < COLUMNS / 16 * RANKS * 2; i++) {
            int c = i / (RANKS * 2), f = i / 2 % RANKS, column = own + c * 16 + i % 2 * 8 + lane % 4 * 2, rank = f * 8 + lane / 4;
            bool inside = column < p.columns;
            factor[c][f][i % 2] = inside ? row(p.factor, column)[rank] | (u32)row(p.factor, column + 1)[rank] << 16 : 0;
        }
    }
    float gradient[COLUMNS / 16][RANKS][4] = {};

    for (int step = 0; step < steps; step++) {
        copies_done<STAGES - 2>();
        __syncthreads();
        load(step + STAGES - 1);
        u32 tiles = stages + step % STAGES * T::BYTES;
        if (PROJECT) {
            if (step > 0) write_projected(step - 1);
            float projected[RANKS][4] = {};
#pragma unroll
            for (int c = 0; c < COLUMNS / 16; c++) {
                u32 wide[4];
                ldmatrix(wide, tiles + T::place(lane % 16, warp * (COLUMNS / 8) + c * 2 + lane / 16));
#pragma unroll
                for (int f = 0; f < RANKS; f++) mma(projected[f], wide, factor[c][f]);
            }
            float4* to = (float4*)(sums + step % 2 * SUMS + warp * TOKENS * RANK) + lane;
#pragma unroll
            for (int f = 0; f < RANKS; f++) {
                to[f * 32] = make_float4(projected[f][0], projected[f][1], projected[f][2], projected[f][3]);
            }
        }
#pragma unroll
        for (int t = 0; t < TOKENS; t += 16) {
            u32 narrow[RANKS + 1][2];
#pragma unroll
            for (int f = 0; f < RANKS; f += 2) {
                u32 both[4];
                int of = min(f + lane / 16, RANKS - 1);
                ldmatrix_transposed(both, tiles + T::WIDE + ((t + lane % 16) * RANKS + of) * 16);
                narrow[f][0] = both[0], narrow[f][1] = both[1], narrow[f + 1][0] = both[2], narrow[f + 1][1] = both[3];
            }
#pragma unroll
            for (int c = 0; c < COLUMNS / 16; c++) {
                u32 wide[4];
                int chunk = warp * (COLUMNS / 8) + c * 2 + lane / 8 % 2;
                ldmatrix_transposed(wide, tiles + T::place(t + lane % 8 + lane / 16 * 8, chunk));
#pragma unroll
                for (int f = 0; f < RANKS; f++) mma(gradient[c][f], wide, narrow[f]);
            }
        }
    }
    if (PROJECT) {
        __syncthreads();
        write_projected(steps - 1);
    }
    float* to = p.gradient + (long long)blockIdx.y * RANK * p.columns;
#pragma unroll
    for (int i = 0; i < COLUMNS / 16 * RANKS * 4; i++) {
        int c = i / (RANKS * 4), f = i / 4 % RANKS;
        int column = own + c * 16 + lane / 4 + i % 4 / 2 * 8, rank = f * 8 + lane % 4 * 2 + i % 2;
        if (column < p.columns) to[(long long)rank * p.columns + column] = gradient[c][f][i % 4];
    }
}

// v = dy·sB, dB = uᵀ·dy.
extern "C" __global__ void __launch_bounds__(WARPS * 32, RANK <= 24 ? 2 : 1)
    lora_vjp_b(View dy, View sb, View u, float* v, float* db, int tokens, int columns, int range) {
    after_previous();
    narrow_products<64, 16, true>({dy, sb, u, v, db, tokens, columns, range});
}

// dA = vᵀ·x.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    lora_vjp_a(View x, View v, float* da, int tokens, int columns, int range) {
    after_previous();
    narrow_products<32, 32, false>({x, {}, v, nullptr, da, tokens, columns, range});
}

// Adds the parts of v: a thread has two columns.
extern "C" __global__ void lora_sum(const float* parts, int count, View to, int tokens) {
    after_previous();
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

// Adds the parts of both gradients to what those were: a thread has one value.
extern "C" __global__ void lora_add(const float* a_parts, int a_count, int a_values, float* a, const float* b_parts, int b_count,
                                    int b_values, float* b) {
    after_previous();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    bool second = i >= a_values;
    const float* parts = second ? b_parts : a_parts;
    float* to = second ? b : a;
    int count = second ? b_count : a_count, values = second ? b_values : a_values;
    if (second) i -= a_values;
    if (i >= values) return;
    float sum = 0.f;
#pragma unroll 16
    for (int part = 0; part < count; part++) sum += parts[(long long)part * values + i];
    to[i] += sum;
}
