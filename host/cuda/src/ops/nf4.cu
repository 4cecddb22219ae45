// W of linears in nf4: codes of four bits, times the scale of their 64, which is an 8-bit code itself. VALUES and SCALES, what the codes
// stand for, come before this file.

#define THREADS 256
#define BLOCK 64         // values that share a scale
#define SCALE_BLOCK 256  // scales that share theirs

__device__ const float values_of[16] = {VALUES};
__device__ const float scales_of[256] = {SCALES};

// W [outputs, inputs] of the members of a stack, one behind the other.
struct Nf4 {
    const u32* codes;             // eight in a word, the first in the high half of the lowest byte
    const unsigned char* scales;  // of every block
    const float2* groups;         // of every SCALE_BLOCK scales of a member, their scale and what is added
    const int2* members;          // first block and first group
    int count, inputs, outputs;
};

#define NF4_PARAMETERS                                                                                             \
    const u32 *codes, const unsigned char *scales, const float2 *groups, const int2 *members, int count, int inputs, int outputs
#define NF4 {codes, scales, groups, members, count, inputs, outputs}

// What the codes stand for, for a block of threads.
struct Tables {
    float values[16], scales[256];

    __device__ __forceinline__ void fill() {
        scales[threadIdx.x] = scales_of[threadIdx.x];
        if (threadIdx.x < 16) values[threadIdx.x] = values_of[threadIdx.x];
        __syncthreads();
    }
};

// The scale of a block, rounded after the product and after the sum, as bitsandbytes does.
__device__ __forceinline__ float scale_of(const Nf4& w, const Tables& tables, int block) {
    int m = w.count - 1;
    while (m > 0 && block < w.members[m].x) m--;
    int2 first = w.members[m];
    float2 group = w.groups[first.y + (block - first.x) / SCALE_BLOCK];
    return __fadd_rn(__fmul_rn(tables.scales[w.scales[block]], group.x), group.y);
}

__device__ __forceinline__ Eight values8(u32 codes, float scale, const Tables& tables) {
    Eight out;
#pragma unroll
    for (int i = 0; i < 8; i++) out.v[i] = tables.values[codes >> (i ^ 1) * 4 & 15] * scale;
    return out;
}

// [[W, sB], [A, 0]] in bf16, with s·B [outputs, rank] and A [rank, inputs]; what is 0 is not written.
extern "C" __global__ void __launch_bounds__(THREADS) nf4_dequantize(NF4_PARAMETERS, View a, View sb, View to, int rank) {
    __shared__ Tables tables;
    Nf4 w = NF4;
    tables.fill();
    after_previous();
    int eights = (inputs + rank) / 8, all = (outputs + rank) * eights;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < all; i += gridDim.x * THREADS) {
        int r = i / eights, c = (i - r * eights) * 8;
        bf16* out = row(to, r) + c;
        if (r < outputs && c < inputs) {
            int word = ((u32)r * inputs + c) / 8;
            store8(out, values8(codes[word], scale_of(w, tables, word / (BLOCK / 8)), tables));
        } else if (r < outputs) {
            *(uint4*)out = *(const uint4*)(row(sb, r) + c - inputs);
        } else if (c < inputs) {
            *(uint4*)out = *(const uint4*)(row(a, r - outputs) + c);
        }
    }
}

// Random codes and scales, for benchmarks: words of random bits.
extern "C" __global__ void nf4_random(u32* to, long long words, u32 seed) {
    after_previous();
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += (long long)gridDim.x * blockDim.x) {
        u64 h = ((u64)i + 1) * 0x9E3779B97F4A7C15ull + (u64)seed * 0xD1B54A32D192ED03ull;
        h = (h ^ (h >> 32)) * 0xD6E8FEB86659FD93ull;
        h = (h ^ (h >> 32)) * 0xD6E8FEB86659FD93ull;
        to[i] = (u32)(h >> 32);
    }
}
