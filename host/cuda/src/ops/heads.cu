// `length` columns of every head, from column x_start of a head of x on, whose heads are x_run columns apart, to column y_start of y's.
extern "C" __global__ void copy_heads(View x, View y, int heads, int length, int x_run, int x_start, int y_run, int y_start) {
    auto [token, i] = place(heads * length);
    if (i >= heads * length) return;
    if ((length | x_run | x_start | y_run | y_start) % 8) {
        // Narrow heads, column by column.
        for (int j = i; j < i + 8; j++) {
            int h = j / length, c = j % length;
            row(y, token)[h * y_run + y_start + c] = row(x, token)[h * x_run + x_start + c];
        }
        return;
    }
    int h = i / length, c = i % length;
    *(uint4*)(row(y, token) + h * y_run + y_start + c) = *(const uint4*)(row(x, token) + h * x_run + x_start + c);
}

// The sum over the heads of every group: y [tokens, groups * dim] of x [tokens, groups * heads * dim]. A thread eight columns.
extern "C" __global__ void sum_heads(View x, View y, int groups, int heads, int dim) {
    auto [token, i] = place(groups * dim);
    if (i >= groups * dim) return;
    const bf16* from = row(x, token) + (long long)(i / dim) * heads * dim + i % dim;
    Eight sum = load8(from);
    for (int h = 1; h < heads; h++) {
        Eight part = load8(from + h * dim);
#pragma unroll
        for (int j = 0; j < 8; j++) sum.v[j] += part.v[j];
    }
    store8(row(y, token) + i, sum);
}
