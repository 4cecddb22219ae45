// How weights are read by matmuls that take the time of reading them.

// Weights are read once: kept, they would push the other side out of the cache.
__device__ __forceinline__ uint4 load_once(const bf16* p) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// Leaves the first `count` of eight values; the others are zero.
__device__ __forceinline__ void cut(uint4& v, int count) {
    u32* words = &v.x;
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = count >= 2 * i + 2 ? words[i] : count == 2 * i + 1 ? words[i] & 0xffffu : 0;
}

