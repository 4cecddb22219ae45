// The VJP of y = columns [start, start + length) of x, or of each of its heads of `run` columns, where that is not where its gradient
// lies: dx is `before`, or zero, and dy in these columns. dx may be `before`.
extern "C" __global__ void narrow_vjp(View dy, View before, View dx, int width, int run, int start, int length) {
    auto [token, i] = place(width);
    if (i >= width) return;
    Eight sum = {};
    if (before.at) sum = load8(row(before, token) + i);
    int h = i / run, c = i % run - start;
    if ((run | start | length) % 8) {
        // Narrow heads, column by column.
#pragma unroll
        for (int j = 0; j < 8; j++) {
            h = (i + j) / run;
            c = (i + j) % run - start;
            if (c >= 0 && c < length) sum.v[j] += to_float(row(dy, token)[h * length + c]);
        }
    } else if (c >= 0 && c < length) {
        Eight own = load8(row(dy, token) + h * length + c);
#pragma unroll
        for (int j = 0; j < 8; j++) sum.v[j] += own.v[j];
    }
    store8(row(dx, token) + i, sum);
}
