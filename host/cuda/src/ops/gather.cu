// Rows of a value: y[i] is x[ids[i]].
extern "C" __global__ void gather_rows(View x, const int* ids, View y, int rows, int width) {
    auto [at, i] = place(width);
    if (i < width) *(uint4*)(row(y, at) + i) = *(const uint4*)(row(x, ids[at]) + i);
}

// The VJP of gather_rows: y[token] is the sum of the rows that were taken from it. `first` has the first of them, `next` of
// every row the next one from the same token; -1 is none.
extern "C" __global__ void scatter_rows(View x, const int* first, const int* next, View y, int tokens, int width) {
    auto [token, i] = place(width);
    if (i >= width) return;
    int taken = first[token];
    Eight sum = {};
    if (taken >= 0) {
        sum = load8(row(x, taken) + i);
        while ((taken = next[taken]) >= 0) {
            Eight other = load8(row(x, taken) + i);
#pragma unroll
            for (int j = 0; j < 8; j++) sum.v[j] += other.v[j];
        }
    }
    store8(row(y, token) + i, sum);
}
