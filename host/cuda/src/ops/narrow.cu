// The VJP of y = columns [start, start + length) of x where that is not where its gradient lies: dx is `before`, or zero, and dy in
// these columns.
extern "C" __global__ void narrow_vjp(View dy, View before, View dx, int width, int start, int length) {
    auto [token, i] = place(width);
    if (i >= width) return;
    Eight sum = {};
    if (before.at) sum = load8(row(before, token) + i);
    if (i >= start && i < start + length) {
        Eight own = load8(row(dy, token) + i - start);
#pragma unroll
        for (int j = 0; j < 8; j++) sum.v[j] += own.v[j];
    }
    store8(row(dx, token) + i, sum);
}
