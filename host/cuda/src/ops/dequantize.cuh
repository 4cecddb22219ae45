// [[W, sB], [A, 0]] in bf16 of a W that is kept in fewer bits: of every group `height` rows of W [outputs, inputs] with s·B [outputs, rank]
// behind, then `rank` rows of A; what is 0 is not written.

#define THREADS 256
#define AHEAD 2  // stores that a thread reads the codes of before it stores any

// A block has a row at a time. Eights reads the codes of eight columns of a row (`at`), and knows what they stand for (`values`).
template <class Eights>
__device__ __forceinline__ void write_stacks(const Eights& w, int inputs, int outputs, const View& a, const View& sb, const View& to,
                                             int rank, int height) {
    int own = inputs / 8, eights = own + rank / 8;
    for (int at = blockIdx.x; at < outputs + outputs / height * rank; at += gridDim.x) {
        uint4* out = (uint4*)row(to, at);
        int group = at / (height + rank), within = at % (height + rank), r = group * height + within;
        if (within >= height) {
            for (int c = threadIdx.x; c < own; c += THREADS) out[c] = ((const uint4*)row(a, group * rank + within - height))[c];
            continue;
        }
        for (int c0 = threadIdx.x; c0 < eights; c0 += THREADS * AHEAD) {
            typename Eights::Raw raw[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (c0 + i * THREADS < own) raw[i] = w.at(r, c0 + i * THREADS);
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                int c = c0 + i * THREADS;
                if (c < own) store8((bf16*)(out + c), w.values(raw[i]));
                else if (c < eights) out[c] = ((const uint4*)row(sb, r))[c - own];
            }
        }
    }
}
