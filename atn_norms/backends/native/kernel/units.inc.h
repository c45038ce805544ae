/* The work for one block of hidden units: forward and backward steps, packed weights, their gradients, and its memory. Included
   by coupled.inc.h. */

/* One forward step of a block. h: all units before the step; `after`: all units after it, for rows that end. */
static void FN(units_forward)(const Work *work, FN(Units) *units, long t, const REAL *h, REAL *after, FN(Rows) rows) {
    const Call *call = work->call;
    const long B = work->batch, D = work->inputs, H = work->hidden, from = units->from, width = units->width, wide = units->wide;
    const int lstm = work->cell == CELL_LSTM;
    REAL *in = units->projected + (call->projected ? t * B * wide : 0), *recurrent = units->recurrent + (call->recurrent ? t * B * wide : 0);
    REAL *cells = units->cells, *now = cells + (call->cells ? t * B * width : 0), *out = (REAL *)call->output + t * B * H + from;
    const REAL *c = call->normed_carry ? units->back : t == 0 || !call->cells ? units->c : now - B * width;
    FN(product)(0, 1, B, D, wide, (const REAL *)call->xs + t * B * D, D, units->ih.panels, units->ih.bias, in);
    FN(product)(0, 1, B, H, wide, h, H, units->hh.panels, units->hh.bias, recurrent);
    if (call->joint) FN(join)(recurrent, in, B * wide);
    FN(state_columns)(work, units->columns + SITE_IH, t, in, wide, rows);
    FN(state_columns)(work, units->columns + SITE_HH, t, recurrent, wide, rows);
    for (long i = 0; i < rows.count; i++) {
        const long r = rows.row[i];
        const FN(Side) x = FN(by_columns)(in + r * wide, units->columns + SITE_IH), u = FN(by_columns)(recurrent + r * wide, units->columns + SITE_HH);
        const REAL *old = lstm ? c + r * width : h + r * H + from;
        FN(row_forward)(work->cell, 1, width, x, u, old, lstm ? now + r * width : out + r * H, units->gate + r * width);
    }
    if (lstm) {
        FN(state_columns)(work, units->columns + SITE_C, t, now, width, rows);
        for (long i = 0; i < rows.count; i++) {
            const long r = rows.row[i];
            const FN(Side) y = FN(by_columns)(now + r * width, units->columns + SITE_C);
            FN(row_output)(1, width, y, units->gate + r * width, out + r * H);
            if (call->normed_carry) FN(row_normed)(1, width, y, units->back + r * width);
        }
    }
    for (long r = 0; r < B && call->lengths; r++) { /* beyond its length a row has output 0 and keeps its state */
        const int alive = FN(alive)(work, t, r);
        FN(copy)(after + r * H + from, alive ? out + r * H : h + r * H + from, width);
        if (!alive) memset(out + r * H, 0, (size_t)width * sizeof(REAL));
        if (!alive && lstm) FN(copy)(now + r * width, c + r * width, width);
    }
    if (lstm && !call->cells) { /* two buffers alternate */
        units->cells = units->c;
        units->c = now;
    }
}

/* One backward step of a block, up to the gradient of its recurrent product. */
static void FN(units_backward)(const Work *work, FN(Units) *units, long t, long first, FN(Rows) rows) {
    const Call *call = work->call;
    const long B = work->batch, D = work->inputs, H = work->hidden, from = units->from, width = units->width, wide = units->wide;
    const int lstm = work->cell == CELL_LSTM, gru = work->cell == CELL_GRU;
    const REAL *in = units->projected + (call->projected ? t * B * wide : 0), *recurrent = units->recurrent + t * B * wide;
    const REAL *cells = units->cells + t * B * width, *dout = (const REAL *)call->doutput + t * B * H + from;
    const REAL *old = lstm ? t ? call->normed_carry ? units->back : cells - B * width : (const REAL *)call->c0 + from : t ? (const REAL *)call->output + (t - 1) * B * H + from : (const REAL *)call->h0 + from;
    const long apart = lstm && t ? width : H; /* distance between rows of `old` */
    REAL *din = units->din + (t - first) * B * wide, *drec = units->drec + (t - first) * B * wide, *dc = units->dc[0], *dold = units->dc[1];
    if (call->joint) memset(units->projected, 0, (size_t)(B * wide) * sizeof(REAL));
    else if (!call->projected) FN(product)(0, 1, B, D, wide, (const REAL *)call->xs + t * B * D, D, units->ih.panels, units->ih.bias, units->projected);
    if (call->normed_carry && t) { /* the state carried from the previous step */
        FN(set_columns)(units->columns + SITE_C, t - 1);
        for (long r = 0; r < B; r++)
            FN(row_normed)(1, width, FN(by_columns)(cells + (r - B) * width, units->columns + SITE_C), units->back + r * width);
    }
    for (int s = 0; s < SITES; s++) FN(set_columns)(units->columns + s, t);
    for (int part = 0; part < 1 + lstm; part++) {
        for (long i = 0; i < rows.count; i++) {
            const long r = rows.row[i];
            const FN(Back) each = {
                FN(by_columns)(in + r * wide, units->columns + SITE_IH), FN(by_columns)(recurrent + r * wide, units->columns + SITE_HH),
                old + r * apart, dout + r * H, units->dh + r * width, units->dz[0] + r * wide, units->dz[1] + r * wide,
                units->hidden[part] + r * width,
            };
            if (!lstm) FN(row_back)(work->cell, 1, width, each);
            else if (part) FN(row_cell_back)(1, width, each, dc + r * width, dold + r * width);
            else FN(row_output_back)(1, width, each, FN(by_columns)(cells + r * width, units->columns + SITE_C));
        }
        for (long i = 0; i < rows.count && call->normed_carry && part == 0; i++)
            FN(add_carried)(units->hidden[0] + rows.row[i] * width, dc + rows.row[i] * width, width);
        if (lstm && part == 0) FN(columns_back)(work, units->columns + SITE_C, t, cells, units->hidden[0], width, rows, units->hidden[1]);
    }
    FN(columns_back)(work, units->columns + SITE_IH, t, in, units->dz[0], wide, rows, din);
    FN(columns_back)(work, units->columns + SITE_HH, t, recurrent, units->dz[gru], wide, rows, drec);
    if (call->joint) memcpy(din, drec, (size_t)(B * wide) * sizeof(REAL));
    if (!lstm) return;
    for (long r = 0; r < B && rows.count < B; r++)
        if (!FN(alive)(work, t, r)) FN(copy)(dold + r * width, dc + r * width, width);
    units->dc[0] = dold;
    units->dc[1] = dc;
}

/* out [R, M] = rows `row` to row + R of the gradient of the recurrent (or the input) product, of every block, times packed
   panels of the transposed weights. */
static void FN(through_weights)(const FN(Coupled) *all, int inputs, long row, long R, const REAL *panels, long M, REAL *out) {
    const long N = all->gates * all->work->hidden;
    memset(out, 0, (size_t)(R * M) * sizeof(REAL));
    for (long p = 0; p < M; p += PANEL)
        for (long b = 0; b < all->blocks; b++) {
            const FN(Units) *units = all->units + b;
            const REAL *from = (inputs ? units->din : units->drec) + row * units->wide;
            FN(strip)(1, 0, R, units->wide, from, units->wide, 1, panels + p * N + all->gates * units->from * PANEL, NULL, out + p, M, M - p);
        }
}

/* Compute the gradient that flows from every block through W_hh to the units of one block. */
static void FN(units_return)(const FN(Coupled) *all, FN(Units) *units, long t, long first, FN(Rows) rows) {
    const long B = all->work->batch, width = units->width, partly = rows.count < B;
    REAL *to = partly ? units->back : units->dh;
    FN(through_weights)(all, 0, (t - first) * B, B, units->turned, width, to);
    for (long i = 0; i < rows.count && partly; i++) FN(copy)(units->dh + rows.row[i] * width, to + rows.row[i] * width, width);
    for (long i = 0; i < rows.count && all->work->cell == CELL_GRU; i++)
#pragma omp simd
        for (long j = 0; j < width; j++) units->dh[rows.row[i] * width + j] += units->hidden[0][rows.row[i] * width + j];
}

/* Return the index in a full row of pre-activations for element i of a block. */
INLINE long FN(feature)(const Work *work, const FN(Units) *units, long i) { return i / units->width * work->hidden + units->from + i % units->width; }

/* Pack the rows of a weight matrix [N, K] and of a bias that belong to a block's pre-activations. */
static void FN(pack_units)(const Work *work, const FN(Units) *units, const REAL *weight, const REAL *bias, long K, FN(Packed) to) {
    memset(to.bias, 0, (size_t)(FN(panels)(units->wide) * PANEL) * sizeof(REAL));
    for (long i = 0; i < units->wide && bias; i++) to.bias[i] = bias[FN(feature)(work, units, i)];
    for (long p = 0; p < units->wide; p += PANEL) {
        const REAL *row[PANEL];
        for (long m = 0; m < PANEL; m++) row[m] = p + m < units->wide ? weight + FN(feature)(work, units, p + m) * K : NULL;
        FN(pack_columns)(to.panels + p * K, row, K);
    }
}

/* Pack columns p to p + columns of a weight matrix, whose rows are `row` apart, as one panel with rows block by block. */
static void FN(pack_back)(const FN(Coupled) *all, const REAL *weight, long row, long p, long columns, REAL *to) {
    for (long b = 0; b < all->blocks; b++)
        for (long i = 0; i < all->units[b].wide; i++, to += PANEL) {
            const REAL *from = weight + FN(feature)(all->work, all->units + b, i) * row + p;
            FN(store)(to, FN(load)(from, columns), VL);
            FN(store)(to + VL, columns > VL ? FN(load)(from + VL, columns - VL) : (FN(vec)){0}, VL);
        }
}

/* Compute the gradients of the weights and biases of a block's units, for K rows of a chunk that starts with `first`. */
static void FN(units_gradients)(const Work *work, const FN(Units) *units, long first, long K, const REAL *xs, const REAL *hs) {
    const Call *call = work->call;
    const long D = work->inputs, H = work->hidden, few = D <= THIN, width = units->width, wide = units->wide;
    const REAL *inputs = (const REAL *)call->xs + first * work->batch * D;
    for (long at = 0; at < wide; at += width) {
        const long row = FN(feature)(work, units, at);
        REAL *dih = (REAL *)call->dweight_ih + row * D, *dhh = (REAL *)call->dweight_hh + row * H;
        FN(thin)(0, width, wide, K, few ? D : 0, units->din + at, inputs, dih, call->dbias_ih ? (REAL *)call->dbias_ih + row : NULL);
        if (!few) FN(accumulate)(0, width, wide, K, D, units->din + at, xs, dih);
        if (call->dbias_hh) FN(thin)(0, width, wide, K, 0, units->drec + at, NULL, NULL, (REAL *)call->dbias_hh + row);
        FN(accumulate)(0, width, wide, K, H, units->drec + at, hs, dhh);
    }
}

/* Take the next n numbers of `room`; if it is NULL, only count them. */
static REAL *FN(next)(REAL *room, size_t *at, long n) {
    REAL *here = room ? room + *at : NULL;
    *at += FN(whole_lines)(n);
    return here;
}

/* Place the arrays of a block in its part of `room`; if it is NULL, return the required size. */
static size_t FN(units_room)(const FN(Coupled) *all, FN(Units) *units, long block, int backward, REAL *room) {
    const Work *work = all->work;
    const Call *call = work->call;
    const long T = work->steps, B = work->batch, D = work->inputs, H = work->hidden, from = block * BLOCK_UNITS;
    const long width = H - from < BLOCK_UNITS ? H - from : BLOCK_UNITS, wide = all->gates * width, N = all->gates * H, columns = FN(panels)(wide) * PANEL;
    size_t at = 0;
    units->from = from;
    units->width = width;
    units->wide = wide;
    for (int s = 0; s < SITES; s++) {
        FN(Columns) *columns = units->columns + s;
        *columns = (FN(Columns)){.site = s, .given = call->site + s, .line = atn_norms_site_buffers(work->site + s, T, block), .from = from, .width = width, .wide = s == SITE_C ? width : wide};
        REAL **each[] = {&columns->gain, &columns->shift, &columns->high, &columns->scale, &columns->factor, &columns->level};
        for (size_t i = 0; i < sizeof each / sizeof *each; i++) *each[i] = FN(next)(room, &at, wide);
    }
    REAL **narrow[] = {&units->c, &units->gate, &units->hidden[0], &units->hidden[1], &units->dh, &units->dc[0], &units->dc[1], &units->back};
    for (size_t i = 0; i < sizeof narrow / sizeof *narrow; i++) *narrow[i] = FN(next)(room, &at, B * width);
    if (!backward || !call->projected) {
        units->ih.panels = FN(next)(room, &at, columns * D);
        units->ih.bias = FN(next)(room, &at, columns);
    }
    if (call->projected) units->projected = (REAL *)call->projected + T * B * all->gates * from;
    else units->projected = FN(next)(room, &at, B * wide);
    if (call->recurrent) units->recurrent = (REAL *)call->recurrent + T * B * all->gates * from;
    else units->recurrent = FN(next)(room, &at, B * wide);
    if (call->cells) units->cells = (REAL *)call->cells + T * B * from;
    else units->cells = FN(next)(room, &at, B * width);
    if (backward) {
        units->turned = FN(next)(room, &at, FN(panels)(width) * PANEL * N);
        REAL **before[] = {&units->dz[0], &units->dz[1]}, **behind[] = {&units->din, &units->drec};
        for (int i = 0; i < 2; i++) *before[i] = FN(next)(room, &at, B * wide);
        for (int i = 0; i < 2; i++) *behind[i] = FN(next)(room, &at, all->packed * B * wide);
    } else {
        units->hh.panels = FN(next)(room, &at, columns * H);
        units->hh.bias = FN(next)(room, &at, columns);
    }
    return at;
}

/* Copy a block's units of rows [B, H] from or to separate rows. */
INLINE void FN(units_copy)(const Work *work, const FN(Units) *units, REAL *to, long to_apart, const REAL *from, long from_apart) {
    for (long r = 0; r < work->batch; r++) FN(copy)(to + r * to_apart, from + r * from_apart, units->width);
}

/* Prepare a block before the first step, in the thread that owns it. */
static void FN(units_begin)(const FN(Coupled) *all, FN(Units) *units, int backward) {
    const Work *work = all->work;
    const Call *call = work->call;
    const long H = work->hidden;
    for (int s = 0; s < SITES; s++) FN(begin_columns)(units->columns + s);
    if (!backward || !call->projected) FN(pack_units)(work, units, call->weight_ih, call->bias_ih, work->inputs, units->ih);
    if (!backward) {
        FN(pack_units)(work, units, call->weight_hh, call->bias_hh, H, units->hh);
        if (work->cell == CELL_LSTM) FN(units_copy)(work, units, units->c, units->width, (const REAL *)call->c0 + units->from, H);
        if (call->normed_carry) FN(units_copy)(work, units, units->back, units->width, (const REAL *)call->c0 + units->from, H);
        return;
    }
    const long N = all->gates * H;
    for (long p = 0; p < units->width; p += PANEL) FN(pack_back)(all, call->weight_hh, H, units->from + p, units->width - p, units->turned + p * N);
    FN(units_copy)(work, units, units->dh, units->width, (const REAL *)call->dh + units->from, H);
    if (work->cell == CELL_LSTM) FN(units_copy)(work, units, units->dc[0], units->width, (const REAL *)call->dc + units->from, H);
}

/* Allocate the memory of every block and the shared arrays; NULL if out of memory. */
static REAL *FN(coupled_room)(FN(Coupled) *all, const Work *work, int backward, size_t more, long **rows) {
    all->work = work;
    all->gates = FN(gates)(work);
    all->blocks = atn_norms_unit_blocks(work->hidden);
    FN(Units) first;
    const size_t each = FN(units_room)(all, &first, 0, backward, NULL), blocks = (size_t)all->blocks; /* the first block is the largest */
    const size_t units = (blocks * sizeof(FN(Units)) + 63) / 64 * 64, lists = (size_t)(work->threads * work->batch) * sizeof(long);
    char *room = atn_norms_memory((each * blocks + more) * sizeof(REAL) + units + lists);
    if (!room) return NULL;
    all->units = (FN(Units) *)room;
    REAL *at = (REAL *)(room + units);
    for (long b = 0; b < all->blocks; b++) FN(units_room)(all, all->units + b, b, backward, at + each * (size_t)b);
    *rows = (long *)(at + each * blocks + more);
    return at + each * blocks;
}
