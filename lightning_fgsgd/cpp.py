"""C++ that the compiled steps are built on: vectors of numbers, and what is done to whole tiles and blocks of them."""

__all__ = ["BLOCKS", "COLUMNS", "PACKING", "VECTORS", "each_weight"]

# Without <cmath>: without optimisation, a third of the time that a 3x3 kernel takes to compile went into reading it.
VECTORS = r"""
#include <omp.h>
#include <stdint.h>
#include <string.h>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)  // bytes in a register: gcc keeps wider vectors in memory
#define WIDEST 64
#elif defined(__AVX__)
#define WIDEST 32
#else
#define WIDEST 16
#endif
constexpr int L = WIDEST / sizeof(real);  // numbers in the widest vector
typedef real vec __attribute__((vector_size(WIDEST)));
typedef std::conditional_t<sizeof(real) == 4, int32_t, int64_t> place;
typedef place places __attribute__((vector_size(WIDEST)));
typedef real loose __attribute__((vector_size(WIDEST), aligned(sizeof(real))));  // a vector at any address
static inline float root(float x) { return __builtin_sqrtf(x); }
static inline double root(double x) { return __builtin_sqrt(x); }
"""

PACKING = r"""
// Kernels of E numbers side by side in memory, and the E planes of a tile of them.
//
// Number e of L neighbouring kernels lies in L different places of a vector, since E is odd: E vectors are blended by place,
// and the places are put in order.
template <int... l> using lanes = std::integer_sequence<int, l...>;

#ifdef __AVX2__
constexpr bool blends(int E) { return E % 2 == 1 && E > 1 && E <= 9; }  // more numbers need more blends than moves
#else
constexpr bool blends(int E) { return false; }
#endif

template <int E>  // whether the numbers of a kernel are in order
static inline bool dense(const int64_t* offsets) {
  for (int e = 0; e < E; ++e) if (offsets[e] != e) return false;
  return blends(E);
}

template <int... at>
static inline vec permute(vec x) {
#ifdef __clang__
  return __builtin_shufflevector(x, x, at...);
#else
  return __builtin_shuffle(x, places{at...});
#endif
}

template <int E>  // the kernel of which number e lies in lane l
constexpr int owner(int e, int l) {
  for (int t = 0; t < L; ++t) if ((E * t + e) % L == l) return t;
  return 0;
}

template <int E, int e, int... l>
static inline vec plane(const vec* v, lanes<l...>) {
  vec x = v[0];
  #pragma GCC unroll 16
  for (int j = 1; j < E; ++j) x = places{((E * owner<E>(e, l) + e) / L == j ? -1 : 0)...} ? v[j] : x;
  return permute<(E * l + e) % L...>(x);
}

template <int E, int e, int... l>
static inline vec spread(const real* plane, lanes<l...>) { return permute<owner<E>(e, l)...>(*(const vec*)plane); }

template <int E, int j, int... l>
static inline vec joined(const vec* v, lanes<l...>) {
  vec x = v[0];
  #pragma GCC unroll 16
  for (int e = 1; e < E; ++e) x = places{((L * j + l) % E == e ? -1 : 0)...} ? v[e] : x;
  return x;
}

template <int E, int... e>
static inline void unpack_all(const real* from, real (*tile)[T], lanes<e...>) {
  for (int t = 0; t < T; t += L, from += E * L) {
    const vec v[E] = {*(const loose*)(from + e * L)...};
    ((*(vec*)(tile[e] + t) = plane<E, e>(v, std::make_integer_sequence<int, L>())), ...);
  }
}

template <int E, int... e>
static inline void pack_all(real* to, real (*tile)[T], lanes<e...>) {
  for (int t = 0; t < T; t += L, to += E * L) {
    const vec v[E] = {spread<E, e>(tile[e] + t, std::make_integer_sequence<int, L>())...};
    ((*(loose*)(to + e * L) = joined<E, e>(v, std::make_integer_sequence<int, L>())), ...);
  }
}

template <size_t E>
static inline void unpack(const real* from, real (&tile)[E][T]) {
  if constexpr (blends(E)) unpack_all<E>(from, tile, std::make_integer_sequence<int, E>());
}

template <size_t E>
static inline void pack(real* to, real (&tile)[E][T]) {
  if constexpr (blends(E)) pack_all<E>(to, tile, std::make_integer_sequence<int, E>());
}
"""

BLOCKS = r"""

#if defined(__AVX512F__)  // keep a vector in its register: gcc would read it again for every product
#define HOLD(x) asm("" : "+v"(x))
#elif defined(__AVX__)
#define HOLD(x) asm("" : "+x"(x))
#else
#define HOLD(x)
#endif

#ifdef __AVX512F__  // as many sums as fit the registers: of 4 rows with this many rows, and of so many rows
constexpr int columns = 4, most = 16;
#else
constexpr int columns = 2, most = 8;
#endif

#define UNROLLED _Pragma("GCC unroll 16")  // sums by number are registers only where the loop over them is gone

static inline vec load(const real* from) { return *(const loose*)from; }
static inline void store(real* to, vec x) { *(loose*)to = x; }
static inline void clear(real (*z)[P]) { memset(z, 0, P * P * sizeof(real)); }

struct matrix {  // the rows of a block, and how far one is from the next
  real* at;
  int64_t pitch;
  real* operator[](int64_t i) const { return at + i * pitch; }
  matrix from(int64_t i) const { return {at ? (*this)[i] : nullptr, pitch}; }
};

// How far apart rows are of which many are read at once: whole lines of the cache, and of long rows an odd number of them.
// Rows of a power of two numbers would push each other out of the first cache.
static inline int64_t pitch_of(int64_t columns) {
  constexpr int line = 64 / sizeof(real);
  const int64_t lines = (columns + line - 1) / line;
  return (lines < 16 ? lines : lines | 1) * line;
}

static inline real sum_of_squares(const real (*z)[P]) {
  real sum = 0;
  for (int i = 0; i < P; ++i) for (int j = 0; j < P; ++j) sum += z[i][j] * z[i][j];
  return sum;
}

template <int N>  // N numbers: a multiple of the identity, a diagonal, or all of the matrix
static inline void fill(real (*z)[P], const real* from) {
  if (N == P * P && P > 1) { memcpy(z, from, P * P * sizeof(real)); return; }
  clear(z);
  for (int i = 0; i < P; ++i) z[i][i] = from[N == 1 ? 0 : i];
}

struct components {  // of a weight: strides of the two axes that count them, from number to number in a row, from row to row
  real* at;
  int64_t second;  // how many there are along the second axis
  const int64_t* strides;

  bool spread() const { return strides[2] != 1; }
  real* operator[](int64_t k) const { return at + k / second * strides[0] + k % second * strides[1]; }
  matrix ahead(int64_t k) const { return at && !spread() ? matrix{(*this)[k], strides[3]} : matrix{}; }

  matrix rows(int64_t n, int64_t k, real* room) const {  // where they lie; in the room, if their numbers are not neighbours
    if (!at) return {};
    if (!spread()) return {(*this)[k], strides[3]};
    const real* const from = (*this)[k];
    for (int i = 0; i < P; ++i)
      for (int64_t d = 0; d < n; ++d) room[i * n + d] = from[d * strides[2] + i * strides[3]];
    return {room, n};
  }

  void write(int64_t n, int64_t k, matrix from) const {
    real* const to = (*this)[k];
    for (int i = 0; i < P; ++i) {
      if (!spread()) memcpy(to + i * strides[3], from[i], n * sizeof(real));
      else for (int64_t d = 0; d < n; ++d) to[d * strides[2] + i * strides[3]] = from[i][d];
    }
  }
};

static inline void scale_row(int64_t n, real* out, const real* a, real x, const real* ahead) {
  int64_t d = 0;
  for (; d + L <= n; d += L) {
    if (ahead) __builtin_prefetch(ahead + d, 0, 2);
    store(out + d, x * load(a + d));
  }
  for (; d < n; ++d) out[d] = a[d] * x;
}

static inline void combine_row(int64_t n, real* out, const real* a, real x, const real* b, real y, const real* ahead) {
  int64_t d = 0;
  for (; d + L <= n; d += L) {
    if (ahead) __builtin_prefetch(ahead + d, 0, 2);
    store(out + d, x * load(a + d) + y * load(b + d));
  }
  for (; d < n; ++d) out[d] = a[d] * x + b[d] * y;
}

static inline real product_of_rows(int64_t n, const real* a, const real* b, const real* ahead) {
  vec sums[4] = {};
  int64_t d = 0;
  for (; d + 4 * L <= n; d += 4 * L)
    UNROLLED for (int t = 0; t < 4; ++t) {
      if (ahead) __builtin_prefetch(ahead + d + t * L, 0, 2);
      sums[t] += load(a + d + t * L) * load(b + d + t * L);
    }
  for (; d + L <= n; d += L) sums[0] += load(a + d) * load(b + d);
  real sum = 0;
  for (; d < n; ++d) sum += a[d] * b[d];
  const vec all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int t = 0; t < L; ++t) sum += all[t];
  return sum;
}

// All rows are one where they lie side by side.
static inline bool joined(int64_t n, matrix a, matrix b) { return a.pitch == n && b.pitch == n; }

static void scale(int64_t n, matrix out, matrix a, real x) {
  if (joined(n, out, a)) return scale_row(n * P, out.at, a.at, x, nullptr);
  for (int i = 0; i < P; ++i) scale_row(n, out[i], a[i], x, nullptr);
}

static void combine(int64_t n, matrix out, matrix a, real x, matrix b, real y, matrix ahead) {
  if (joined(n, a, b) && out.pitch == n) return combine_row(n * P, out.at, a.at, x, b.at, y, ahead.at);
  for (int i = 0; i < P; ++i) combine_row(n, out[i], a[i], x, b[i], y, ahead.from(i).at);
}

static real inner_product(int64_t n, matrix a, matrix b, matrix ahead) {
  if (joined(n, a, b)) return product_of_rows(n * P, a.at, b.at, ahead.at);
  real sum = 0;
  for (int i = 0; i < P; ++i) sum += product_of_rows(n, a[i], b[i], ahead.from(i).at);
  return sum;
}

// Of each row with the row in the same place.
static void inner_products(int64_t n, matrix a, matrix b, real* z, matrix ahead) {
  for (int i = 0; i < P; ++i) z[i] = product_of_rows(n, a[i], b[i], ahead.from(i).at);
}

// Sums of pairs of neighbours that are W apart, of both vectors in turn.
template <int W, int... T>
static inline vec pairs(vec a, vec b, std::integer_sequence<int, T...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (T / W % 2 ? L + T - W : T)...) +
         __builtin_shufflevector(a, b, (T / W % 2 ? L + T : T + W)...);
#else
  return __builtin_shuffle(a, b, places{(T / W % 2 ? L + T - W : T)...}) +
         __builtin_shuffle(a, b, places{(T / W % 2 ? L + T : T + W)...});
#endif
}

// The sum of each of N vectors.
template <int W, int N>
static inline void sums_of(vec* x, real* to) {
  if constexpr (W == L) { UNROLLED for (int i = 0; i < N; ++i) store(to + i * L, x[i]); }
  else {
    UNROLLED for (int i = 0; i < N / 2; ++i) x[i] = pairs<W>(x[2 * i], x[2 * i + 1], std::make_integer_sequence<int, L>());
    sums_of<2 * W, N / 2>(x, to);
  }
}

// Inner products of 4 rows with ``columns`` rows, all sums in registers.
static inline void inner_of(int64_t n, matrix a, matrix b, real* z, matrix ahead) {
  vec sums[4 * columns] = {};
  int64_t d = 0;
  for (; d + L <= n; d += L) {
    vec y[columns];
    UNROLLED for (int j = 0; j < columns; ++j) { y[j] = load(b[j] + d); HOLD(y[j]); }
    UNROLLED for (int i = 0; i < 4; ++i) {
      vec x = load(a[i] + d);
      HOLD(x);
      if (ahead.at) __builtin_prefetch(ahead[i] + d, 0, 2);
      UNROLLED for (int j = 0; j < columns; ++j) sums[columns * i + j] += x * y[j];
    }
  }
  real found[4 * columns];
  sums_of<1, 4 * columns>(sums, found);
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < columns; ++j) {
      real sum = found[columns * i + j];
      for (int64_t c = d; c < n; ++c) sum += a[i][c] * b[j][c];
      z[i * P + j] = sum;
    }
}

// Of 4 rows with 4 rows.
static inline void inner(int64_t n, matrix a, matrix b, real* z, matrix ahead) {
  for (int j = 0; j < 4; j += columns) inner_of(n, a, b.from(j), z + j, j ? matrix{} : ahead);
}

// The next block is fetched meanwhile, where ``ahead`` is given.
template <bool symmetric>
static void gram(int64_t n, matrix a, matrix b, real (*z)[P], matrix ahead) {
  constexpr int whole = P / 4 * 4;
  for (int i = 0; i < whole; i += 4)
    for (int j = symmetric ? i : 0; j < whole; j += 4)
      inner(n, a.from(i), b.from(j), z[i] + j, j > (symmetric ? i : 0) ? matrix{} : ahead.from(i));
  for (int i = 0; i < P; ++i)
    for (int j = i < whole ? whole : symmetric ? i : 0; j < P; ++j) z[i][j] = product_of_rows(n, a[i], b[j], nullptr);
  if (symmetric) for (int i = 0; i < P; ++i) for (int j = 0; j < i; ++j) z[i][j] = z[j][i];
}

// I rows of x · c + y · q z, a vector of columns at a time; rows of z before ``begin`` and from ``end`` on are zero there.
template <int I>
static inline void sums_of_rows(int64_t n, matrix out, matrix c, real x, real y, matrix q, const real (*z)[P], int i0,
                                int begin, int end, matrix ahead) {
  real f[P][I];
  for (int j = begin; j < end; ++j) for (int i = 0; i < I; ++i) f[j][i] = y * z[j][i0 + i];
  int64_t d = 0;
  for (; d + L <= n; d += L) {
    vec sums[I];
    UNROLLED for (int i = 0; i < I; ++i) sums[i] = c.at ? x * load(c[i0 + i] + d) : vec{};
    for (int j = begin; j < end; ++j) {
      const vec row = load(q[j] + d);
      if (ahead.at) __builtin_prefetch(ahead[j] + d, 0, 2);
      UNROLLED for (int i = 0; i < I; ++i) sums[i] += f[j][i] * row;
    }
    UNROLLED for (int i = 0; i < I; ++i) store(out[i0 + i] + d, sums[i]);
  }
  for (; d < n; ++d)
    for (int i = 0; i < I; ++i) {
      real sum = c.at ? x * c[i0 + i][d] : real(0);
      for (int j = begin; j < end; ++j) sum += f[j][i] * q[j][d];
      out[i0 + i][d] = sum;
    }
}

enum shape { full, upper, lower };

template <shape S>
static void apply(int64_t n, matrix out, matrix c, real x, real y, matrix q, const real (*z)[P], matrix ahead) {
  constexpr int many = S == full ? most : most / 2;  // fewer rows have more zeros in common
  constexpr int whole = P / many * many;
  for (int i = 0; i < whole; i += many)
    sums_of_rows<many>(n, out, c, x, y, q, z, i, S == lower ? i : 0, S == upper ? i + many : P, i ? matrix{} : ahead);
  for (int i = whole; i < P; ++i)
    sums_of_rows<1>(n, out, c, x, y, q, z, i, S == lower ? i : 0, S == upper ? i + 1 : P, matrix{});
}

// x · c + y · q z, of a diagonal z.
static void apply_diagonal(int64_t n, matrix out, matrix c, real x, real y, matrix q, const real* z, matrix ahead) {
  for (int i = 0; i < P; ++i) {
    if (c.at) combine_row(n, out[i], c[i], x, q[i], y * z[i], ahead.from(i).at);
    else scale_row(n, out[i], q[i], y * z[i], ahead.from(i).at);
  }
}

static inline void multiply(real (*a)[P], real (*b)[P], real (*z)[P]) {
  real transposed[P][P];
  for (int i = 0; i < P; ++i) for (int j = 0; j < P; ++j) transposed[j][i] = a[i][j];
  apply<full>(P, {z[0], P}, {}, 0, 1, {b[0], P}, transposed, {});
}
"""


# Of a row of the table of weights, see `each_weight`.
COLUMNS = ("threads", "layout", "s", *"WGB", *"UVR", "M", "S", "F", "sums", "moved", "room")


def each_weight(slots: str, room: str) -> str:
    """``kernel``, which works through a table of weights, and the head of the function that does one of them.

    A row of the table has the whole numbers ``COLUMNS``, which are that function's arguments: the number of threads; and
    addresses of the layout, the numbers of the step, the weight, gradient and momentum, U and its inverse, R, the
    components' manifolds and groups (``slots``), 1/𝔤 and squared norms of the groups, whether a component was moved, and
    room to work in.
    """
    kinds = dict.fromkeys(COLUMNS, "const real*") | {
        "threads": "int64_t",
        "layout": "const int64_t*",
        **dict.fromkeys("WGB", "real*"),
        "M": "const uint8_t*",
        "S": f"const {slots}*",
        "sums": "double*",
        "moved": "bool*",
        "room": f"{room}*",
    }
    head = f"static void one({', '.join(f'{kinds[name]} {name}' for name in COLUMNS)})"
    given = ", ".join(f"({kinds[name]})row[{i}]" for i, name in enumerate(COLUMNS))
    return f"""
{head};

extern "C" void kernel(int64_t weights, const int64_t* rows) {{
  for (int64_t i = 0; i < weights; ++i) {{
    const int64_t* const row = rows + i * {len(COLUMNS)};
    one({given});
  }}
}}

{head}"""
