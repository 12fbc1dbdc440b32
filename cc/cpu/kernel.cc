// The kernel: attention, block scores and their merge, for the instruction set that this file is
// compiled for.
//
// Scores lie transposed, [position][row], so that the rows of a panel fill the lanes of vectors and
// softmax and window sums are vertical. A panel of fewer rows than lanes is padded to a power of
// two, and a vector holds several positions.

#include "cpu/kernel.h"

#include "cpu/simd.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

constexpr int64_t kGranule = kPositionGranule;
constexpr int64_t kSteps = 32;     // of words of value rows, packed at once
constexpr int64_t kChain = 32;     // float32 products that are added one after another
constexpr int64_t kLoopsPerStep = 16 / kAccumulators;  // inner loops in a step of Ahead
constexpr float kNoPeak = -1e38f;  // below every score, and finite
constexpr float kLog2E = 1.44269504f;

constexpr int64_t RoundUp(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

constexpr int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t Most(int64_t a, int64_t b) { return a > b ? a : b; }

// Words of a row of `size` elements in scratch memory, for products of any type.
constexpr int64_t PaddedWords(int64_t size) { return RoundUp(size, 2 * kLanes); }

// The memory of one unit. Sizes in words of 4 bytes.
struct Scratch {
  uint32_t* query;  // [heads][words / repeat][padded rows * repeat]
  float* history;   // [heads][kGranule][padded rows], weights of the positions before the tile
  float* weights;   // [kGranule + tile + kGranule][padded rows]: history, scores or weights, zeros
  uint32_t* pairs;  // [tile][padded rows], weights as operands
  uint32_t* key;    // [kGranule][padded words]
  uint32_t* value;  // [kSteps][padded value size]
  float* factors;   // [padded rows]
  int64_t size;

  Scratch(const Plan& plan, int64_t heads, int64_t padded_rows, void* memory) {
    const int64_t rows = Most(padded_rows, kLanes);
    char* next = static_cast<char*>(memory);
    const auto take = [&](int64_t words) {
      char* const taken = next;
      next += RoundUp(4 * words, kTileAlignment);
      return taken;
    };
    const auto floats = [&](int64_t words) { return reinterpret_cast<float*>(take(words)); };
    const auto operands = [&](int64_t words) { return reinterpret_cast<uint32_t*>(take(words)); };
    query = operands(heads * PaddedWords(plan.problem.head_size) * padded_rows);
    history = floats(heads * kGranule * padded_rows);
    weights = floats((kGranule + plan.tile_size + kGranule) * padded_rows + kLanes);
    pairs = operands(plan.tile_size * padded_rows);
    key = operands(kGranule * PaddedWords(plan.problem.head_size));
    value = operands(kSteps * PaddedWords(plan.problem.value_size));
    factors = floats(rows);
    size = next - static_cast<char*>(memory);
  }
};

void Fill(float* target, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) target[i] = value;
}

// Calls Type::Load on `count` elements, those past them zero.
template <class Type>
inline void LoadSome(const void* source, int64_t count, Float* a, Float* b) {
  if (count >= 2 * kLanes) return Type::Load(source, a, b);
  typename Type::Bits elements[2 * kLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    elements[i] = static_cast<const typename Type::Bits*>(source)[i];
  }
  Type::Load(elements, a, b);
}

// Stores the first `count` elements of two vectors in the order of Order::Load.
template <class Order, class Type>
inline void StoreSome(void* target, int64_t count, Float a, Float b) {
  if constexpr (Order::kInterleaves && !Type::kInterleaves) Interleave(&a, &b);
  if (count >= 2 * kLanes) return Type::Store(target, a, b);
  typename Type::Bits elements[2 * kLanes];
  Type::Store(elements, a, b);
  for (int64_t i = 0; i < count; ++i) {
    static_cast<typename Type::Bits*>(target)[i] = elements[i];
  }
}

// Rows of memory.
struct Rows {
  const char* first;
  int64_t stride;  // bytes from one to the next
  int64_t bytes;   // of each
  int64_t count;
};

// Fetches the keys, then the values, of the next tile while the present one is worked on, all kv
// heads of a row together: a straight line through memory, whatever order the heads are read in.
// The inner loops call Step after each few instructions, so that memory is always busy and never
// stalls them.
class Ahead {
 public:
  // To be fetched in `steps` calls of Step.
  Ahead(const Rows& keys, const Rows& values, int64_t steps)
      : row_(Join(keys)), next_(Join(values)) {
    line_ = row_.first;
    rate_ = (Lines(row_) + Lines(next_)) * kUnit / steps + 1;
  }

  void Step(int64_t steps = 1) {
    for (due_ += steps * rate_; due_ >= kUnit; due_ -= kUnit) FetchLine();
  }

 private:
  static constexpr int64_t kLine = 64, kUnit = 1 << 16;

  // Rows that touch are one.
  static Rows Join(const Rows& rows) {
    return rows.bytes == rows.stride ? Rows{rows.first, 0, rows.bytes * rows.count, rows.count > 0}
                                     : rows;
  }
  static int64_t Lines(const Rows& rows) { return rows.count * ((rows.bytes + kLine - 1) / kLine); }

  void FetchLine() {
    if (line_ >= row_.first + row_.bytes) {
      if (row_.count > 1) {
        --row_.count;
        row_.first += row_.stride;
      } else {
        row_ = next_;
        next_.count = next_.bytes = 0;
      }
      line_ = row_.first;
    }
    if (row_.count > 0) __builtin_prefetch(line_, 0, 2);
    line_ += kLine;
  }

  Rows row_, next_;  // row_.first is the present one
  const char* line_;
  int64_t rate_, due_ = 0;
};

// How operands of an element type become words.
template <class Type, class Products>
struct Operands {
  static constexpr bool kPairs = Products::kElements == 2;
  // Whether the words of a row are its bytes in memory.
  static constexpr bool kInPlace = kPairs || sizeof(typename Type::Bits) == 4;
  static constexpr int64_t kElementSize = sizeof(typename Type::Bits);

  // The words of a row, padded with zeros to a multiple of kLanes; returns how many. The same order
  // for queries and keys.
  static int64_t RowWords(const void* row, int64_t size, uint32_t* words) {
    const char* source = static_cast<const char*>(row);
    if constexpr (kPairs) {
      typename Type::Bits* elements = reinterpret_cast<typename Type::Bits*>(words);
      const int64_t padded = RoundUp(size, 2 * kLanes);
      __builtin_memcpy(elements, source, size * kElementSize);
      for (int64_t c = size; c < padded; ++c) elements[c] = 0;
      return padded / 2;
    } else {
      for (int64_t c = 0; c < size; c += 2 * kLanes) {
        Float a, b;
        LoadSome<Type>(source + c * kElementSize, size - c, &a, &b);
        Store(words + c, a);
        Store(words + c + kLanes, b);
      }
      return RoundUp(size, 2 * kLanes);
    }
  }

  static Word LoadWords(const char* source, int64_t count) {
    if (count >= 2 * kLanes) return Load<Word>(source);
    uint16_t elements[2 * kLanes] = {};
    __builtin_memcpy(elements, source, count * kElementSize);
    return Load<Word>(elements);
  }

  static int64_t PackSteps(int64_t size) { return (size + 4 * kLanes - 1) / (4 * kLanes); }

  // Packs up to Products::kElements value rows into the words of one step, [padded value size] in
  // the order of Type::Load; `second` may be null.
  static void StepWords(const char* first, const char* second, int64_t size, uint32_t* words,
                        Ahead& ahead) {
    ahead.Step(PackSteps(size));
    for (int64_t c = 0; c < size; c += 2 * kLanes) {
      if constexpr (kPairs) {
        const Word low = LoadWords(first + c * kElementSize, size - c);
        const Word high = second ? LoadWords(second + c * kElementSize, size - c) : Word{};
        Store(words + c, (low & 0xffff) | (high << 16));
        Store(words + c + kLanes, (low >> 16) | (high & 0xffff0000));
      } else {
        Float a, b;
        LoadSome<Type>(first + c * kElementSize, size - c, &a, &b);
        Store(words + c, a);
        Store(words + c + kLanes, b);
      }
    }
  }
};

// Keys that are multiplied at once: as many as leave registers for their addresses and sums.
constexpr int KeysAtOnce(int vectors) {
  return kAccumulators / vectors < 8 ? kAccumulators / vectors : 8;
}

// Products of `keys` keys with `vectors` vectors of rows, `repeat` words of a key at a time with as
// many of each row. query: [groups][query_stride].
template <class Products, int repeat, int vectors, int count>
inline void MultiplyKeys(const char* keys, int64_t key_stride, int64_t groups,
                         const uint32_t* query, int64_t query_stride, Ahead& ahead,
                         Float (&sums)[count][vectors]) {
  Float block[count][vectors] = {};
  for (int64_t g = 0; g < groups; ++g) {
    if (g % kLoopsPerStep == 0) ahead.Step();
    Word q[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) q[v] = Load<Word>(query + g * query_stride + v * kLanes);
#pragma GCC unroll 8
    for (int p = 0; p < count; ++p) {
      const Word k = Repeat<repeat>(keys + p * key_stride + g * 4 * repeat);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) block[p][v] = Products::MultiplyAdd(k, q[v], block[p][v]);
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < count; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sums[p][v] = block[p][v];
  }
}

// Scores of kGranule keys for a panel that is no wider than a vector. Its rows fill `vectors`
// vectors as `repeat` lanes each, whose sums are folded in the end: the wider a repeated load, the
// fewer there are.
template <class Products, int repeat, int vectors>
void ScoreNarrow(const char* keys, int64_t key_stride, int64_t groups, const uint32_t* query,
                 bool add, float* scores, Ahead& ahead) {
  constexpr int kKeys = KeysAtOnce(vectors);
  Float sums[kGranule][vectors];
  for (int64_t p = 0; p < kGranule; p += kKeys) {
    MultiplyKeys<Products, repeat>(keys + p * key_stride, key_stride, groups, query,
                                   vectors * kLanes, ahead,
                                   reinterpret_cast<Float(&)[kKeys][vectors]>(sums[p]));
  }
  for (int64_t i = 0; i < kGranule * vectors; i += repeat) {
    const Float sum = TransposeRuns<repeat>(FoldRuns<repeat>(&sums[0][0] + i));
    float* const target = scores + i / repeat * kLanes;
    Store(target, add ? Load<Float>(target) + sum : sum);
  }
}

// Scores of kGranule keys for `vectors` vectors of rows.
template <class Products, int vectors>
void ScoreWide(const char* keys, int64_t key_stride, int64_t groups, const uint32_t* query,
               bool add, float* scores, int64_t padded_rows, Ahead& ahead) {
  constexpr int kKeys = KeysAtOnce(vectors);
  for (int64_t p = 0; p < kGranule; p += kKeys) {
    Float sums[kKeys][vectors];
    MultiplyKeys<Products, 1>(keys + p * key_stride, key_stride, groups, query, padded_rows, ahead,
                              sums);
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        float* const target = scores + (p + i) * padded_rows + v * kLanes;
        Store(target, add ? Load<Float>(target) + sums[i][v] : sums[i][v]);
      }
    }
  }
}

// Words of a key that are multiplied at once with as many of each row.
int64_t KeyRepeat(int64_t padded_rows) {
  return padded_rows > kLanes ? 1 : Least(kLanes, 2 * kLanes / padded_rows);
}

// How often scoring kGranule keys takes a step ahead for each group of words.
int64_t ScoreSteps(int64_t padded_rows) {
  const int64_t vectors = padded_rows * KeyRepeat(padded_rows) / kLanes;
  return Most(kGranule / 8, kGranule * vectors / kAccumulators);
}

// Scores of kGranule keys for a whole panel: [position][padded_rows], added to if `add`.
template <class Products>
void Score(const char* keys, int64_t key_stride, int64_t groups, const uint32_t* query, bool add,
           float* scores, int64_t padded_rows, Ahead& ahead) {
  const auto narrow = [&](auto repeat, auto vectors) {
    ScoreNarrow<Products, decltype(repeat)::value, decltype(vectors)::value>(
        keys, key_stride, groups, query, add, scores, ahead);
  };
  const auto wide = [&](auto vectors, int64_t r) {
    ScoreWide<Products, decltype(vectors)::value>(keys, key_stride, groups, query + r, add,
                                                  scores + r, padded_rows, ahead);
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  if (padded_rows == 1) return narrow(std::integral_constant<int, kLanes>{}, one);
  if (padded_rows <= kLanes) {
    switch (KeyRepeat(padded_rows)) {
      case 2:
        return narrow(two, two);
      case 4:
        if constexpr (kLanes >= 4) return narrow(std::integral_constant<int, 4>{}, two);
        return;
      case 8:
        if constexpr (kLanes >= 8) return narrow(std::integral_constant<int, 8>{}, two);
        return;
      case 16:
        if constexpr (kLanes >= 16) return narrow(std::integral_constant<int, 16>{}, two);
        return;
    }
  }
  int64_t r = 0;
  for (; r + 4 * kLanes <= padded_rows && kAccumulators >= 16; r += 4 * kLanes) {
    wide(std::integral_constant<int, 4>{}, r);
  }
  for (; r + 2 * kLanes <= padded_rows; r += 2 * kLanes) wide(two, r);
  for (; r < padded_rows; r += kLanes) wide(one, r);
}

// Adds the products of `rows` rows of weights with `vectors` vectors of values.
// weights: [steps][weight_stride]; values: [steps][value_stride]; sums: [rows][value_stride].
template <class Products, int rows, int vectors>
inline void WeightBlock(int64_t steps, const uint32_t* weights, int64_t weight_stride,
                        const uint32_t* values, int64_t value_stride, float* sums, Ahead& ahead) {
  Float block[rows][vectors] = {};
  for (int64_t s = 0; s < steps; ++s) {
    if (s % kLoopsPerStep == 0) ahead.Step();
    Word value[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      value[v] = Load<Word>(values + s * value_stride + v * kLanes);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const Word weight = Repeat<1>(weights + s * weight_stride + r);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        block[r][v] = Products::MultiplyAdd(weight, value[v], block[r][v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* const sum = sums + r * value_stride + v * kLanes;
      Store(sum, Load<Float>(sum) + block[r][v]);
    }
  }
}

// How often weighing values takes a step ahead for each step of words.
int64_t WeightSteps(int64_t rows, int64_t value_stride) {
  return RoundUp(value_stride, 4 * kLanes) / (4 * kLanes) *
         (rows / (kAccumulators / 4) + rows % (kAccumulators / 4));
}

template <class Products>
void Weight(int64_t steps, int64_t rows, const uint32_t* weights, int64_t weight_stride,
            const uint32_t* values, int64_t value_stride, float* sums, Ahead& ahead) {
  constexpr int kRows = kAccumulators / 4;
  const auto columns = [&](auto vectors, int64_t c) {
    constexpr int kVectors = decltype(vectors)::value;
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) {
      WeightBlock<Products, kRows, kVectors>(steps, weights + r, weight_stride, values + c,
                                             value_stride, sums + r * value_stride + c, ahead);
    }
    for (; r < rows; ++r) {
      WeightBlock<Products, 1, kVectors>(steps, weights + r, weight_stride, values + c,
                                         value_stride, sums + r * value_stride + c, ahead);
    }
  };
  int64_t c = 0;
  for (; c + 4 * kLanes <= value_stride; c += 4 * kLanes) {
    columns(std::integral_constant<int, 4>{}, c);
  }
  if (c < value_stride) columns(std::integral_constant<int, 2>{}, c);
}

// Positions of a page that are attended to at once.
struct Tile {
  int64_t index;  // among the tiles of the unit
  int64_t begin;  // first position, in the sequence
  int64_t count;
  int64_t first_row;  // row in the pool

  static Tile At(const Plan& plan, const Unit& unit, int64_t index) {
    const int64_t page_size = plan.problem.page_size;
    const int64_t page = unit.begin / page_size + index / plan.tiles_per_page;
    const int64_t offset = index % plan.tiles_per_page * plan.tile_size;
    const int64_t begin = page * page_size + offset;
    const int64_t end = Least(unit.end, Least(begin + plan.tile_size, (page + 1) * page_size));
    Tile tile = {index, begin, Most(end - begin, 0), 0};
    if (tile.count > 0) {
      const int64_t entry = unit.sequence * plan.problem.pages_per_sequence + page;
      tile.first_row = plan.arrays.block_table[entry] * page_size + offset;
    }
    return tile;
  }
};

// The first block that closes at or after a position.
inline int64_t FirstClosing(const Plan& plan, int64_t position) {
  const int64_t stride = plan.strides_per_select_block;
  return (position + stride - 1) / stride - 1;
}

// The first block that no position up to `end` closes, or for the last tile of a unit, adds to.
inline int64_t BlocksEnd(const Plan& plan, const Unit& unit, const Partial& partial, int64_t end) {
  return end >= unit.end
             ? partial.last_block
             : Most(partial.first_block, Least(partial.last_block, FirstClosing(plan, end)));
}

// Turns the scores of a tile into weights relative to the greatest score so far; what was summed
// before is rescaled if that grew.
void Softmax(const Plan& plan, const Unit& unit, const Tile& tile, const Partial& partial,
             float scale, int64_t value_stride, const Scratch& scratch, float* history) {
  const int64_t padded_rows = unit.padded_rows, rows = unit.tokens * plan.group;
  float* const weights = scratch.weights + kGranule * padded_rows;
  Fill(weights + tile.count * padded_rows,
       (RoundUp(tile.count, kGranule) - tile.count) * padded_rows, -__builtin_inff());
  if (tile.begin + tile.count == unit.length && unit.early > 0) {
    Fill(weights + (tile.count - 1) * padded_rows, Least(unit.early * plan.group, rows),
         -__builtin_inff());
  }
  const int64_t floats = RoundUp(tile.count, kGranule) * padded_rows;
  const int64_t stride = Most(padded_rows, kLanes);
  bool grew = false;
  for (int64_t v = 0; v < stride; v += kLanes) {
    Float peak = Set(-__builtin_inff());
    for (int64_t i = v; i < floats; i += stride) peak = Max(Load<Float>(weights + i), peak);
    peak *= scale;
    // A vector of several positions: the greatest of each row, in all its lanes.
    for (int64_t turn = padded_rows; turn < kLanes; turn *= 2) {
      float twice[2 * kLanes];
      Store(twice, peak);
      Store(twice + kLanes, peak);
      peak = Max(Load<Float>(twice + turn), peak);
    }
    const Float old_peak = Load<Float>(partial.peak + v);
    peak = Max(peak, old_peak);
    Store(partial.peak + v, peak);
    const Float factor = Exp2(old_peak - peak);
    Store(scratch.factors + v, factor);
    for (int lane = 0; lane < kLanes; ++lane) grew |= factor[lane] != 1.0f;

    Float total = {};
    for (int64_t i = v; i < floats; i += stride) {
      const Float weight = Exp2(Load<Float>(weights + i) * scale - peak);
      Store(weights + i, weight);
      total += weight;
    }
    Store(partial.total + v, Load<Float>(partial.total + v) * factor + total);
  }
  for (int64_t r = 0; r < padded_rows; ++r) {
    partial.tile_peaks[tile.index * padded_rows + r] = partial.peak[r];
  }
  if (grew) {
    for (int64_t r = 0; r < rows; ++r) {
      const float factor = scratch.factors[r];
      if (factor == 1.0f) continue;
      float* const row = partial.attention + r * value_stride;
      for (int64_t c = 0; c < value_stride; c += kLanes) {
        Store(row + c, Load<Float>(row + c) * factor);
      }
    }
    for (int64_t i = 0; i < kGranule; ++i) {
      for (int64_t r = 0; r < padded_rows; ++r) history[i * padded_rows + r] *= scratch.factors[r];
    }
  }
}

// Sums the weights into the blocks that close in the tile.
void SumBlocks(const Plan& plan, const Unit& unit, const Tile& tile, const Partial& partial,
               const float* weights) {
  const int64_t padded_rows = unit.padded_rows;
  const int64_t first =
      tile.index == 0 ? partial.first_block : BlocksEnd(plan, unit, partial, tile.begin);
  const int64_t last = BlocksEnd(plan, unit, partial, tile.begin + tile.count);
  for (int64_t j = first; j < last; ++j) {
    const float* const closing =
        weights + (plan.strides_per_select_block * (j + 1) - tile.begin) * padded_rows;
    // Of few rows, the lanes past them are of later positions, and the next block's overwrite them.
    for (int64_t r = 0; r < padded_rows; r += kLanes) {
      Float sum = {};
      for (int64_t o = 0; o < plan.num_taps; ++o) {
        sum += plan.weights[o] * Load<Float>(closing - o * padded_rows + r);
      }
      Store(partial.scores + (j - partial.first_block) * padded_rows + r, sum);
    }
  }
}

// Of two vectors of positions, `rows` rows each: the rows of the even ones, or of the odd ones.
template <int rows, bool odd, int... lane>
inline Word EveryOther(Word a, Word b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, (lane / rows * 2 * rows + odd * rows + lane % rows)...);
}

// Rounds weights in pairs of positions: [positions][rows] to [positions / 2][rows].
template <int rows>
void PairWeights(const float* weights, int64_t positions, int64_t padded_rows, uint32_t* pairs) {
  for (int64_t i = 0; i < positions * rows; i += 2 * kLanes) {
    const Word a = ToBFloat16(Load<Float>(weights + i));
    const Word b = ToBFloat16(Load<Float>(weights + i + kLanes));
    Store(pairs + i / 2, EveryOther<rows, false>(a, b, AllLanes{}) |
                             (EveryOther<rows, true>(a, b, AllLanes{}) << 16));
  }
  (void)padded_rows;
}

// Weights as operands: themselves, or rounded in pairs of positions, [step][padded rows].
template <class Products>
const uint32_t* WeightWords(const float* weights, int64_t count, int64_t padded_rows,
                            uint32_t* pairs) {
  if constexpr (Products::kElements == 1) {
    return reinterpret_cast<const uint32_t*>(weights);
  } else {
    // Positions past `count` weigh zero, up to a multiple of kGranule.
    const int64_t positions = RoundUp(count, kGranule);
    switch (padded_rows) {
      case 1:
        PairWeights<1>(weights, positions, padded_rows, pairs);
        break;
      case 2:
        PairWeights<2>(weights, positions, padded_rows, pairs);
        break;
      case 4:
        PairWeights<4>(weights, positions, padded_rows, pairs);
        break;
      case 8:
        PairWeights<8>(weights, positions, padded_rows, pairs);
        break;
      default:
        for (int64_t s = 0; s < positions / 2; ++s) {
          for (int64_t r = 0; r < padded_rows; r += kLanes) {
            const Float even = Load<Float>(weights + 2 * s * padded_rows + r);
            const Float odd = Load<Float>(weights + (2 * s + 1) * padded_rows + r);
            Store(pairs + s * padded_rows + r, ToBFloat16(even) | (ToBFloat16(odd) << 16));
          }
        }
    }
    return pairs;
  }
}

template <class Type, class KeyProducts, class ValueProducts>
void Attend(const Plan& plan, const Unit& unit, const Partial* partials, void* memory) {
  using Key = Operands<Type, KeyProducts>;
  using Value = Operands<Type, ValueProducts>;
  constexpr int64_t kElement = Key::kElementSize;
  const Problem& problem = plan.problem;
  const int64_t padded_rows = unit.padded_rows, rows = unit.tokens * plan.group;
  const int64_t repeat = KeyRepeat(padded_rows);
  const int64_t value_stride = PaddedWords(problem.value_size);
  const Scratch scratch(plan, unit.heads, padded_rows, memory);

  // A negative scale changes the sign of the query, so that the greatest product is the peak;
  // a zero one clears it, so that masked scores stay -inf.
  const float scale = problem.scale == 0 ? 1 : __builtin_fabsf(problem.scale) * kLog2E;
  const uint32_t sign = problem.scale < 0 ? (Key::kPairs ? 0x80008000u : 0x80000000u) : 0;
  const uint32_t keep = problem.scale == 0 ? 0 : ~0u;

  // Keys are read where they lie if their words are whole groups of `repeat`.
  const bool in_place = Key::kInPlace && problem.head_size * kElement % (4 * repeat) == 0;
  const int64_t words = in_place ? problem.head_size * kElement / 4
                                 : RoundUp(problem.head_size, 2 * kLanes) / KeyProducts::kElements;
  const int64_t groups = words / repeat;
  const int64_t query_size = words * Most(padded_rows, 1);

  for (int64_t h = 0; h < unit.heads; ++h) {
    uint32_t* const query = scratch.query + h * query_size;
    for (int64_t i = 0; i < query_size; ++i) query[i] = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = (unit.first_head + h) * plan.group + r % plan.group;
      const int64_t row = (unit.first_row + r / plan.group) * problem.heads + head;
      Key::RowWords(
          static_cast<const char*>(plan.arrays.query) + row * problem.head_size * kElement,
          problem.head_size, scratch.key);
      for (int64_t g = 0; g < groups; ++g) {
        for (int64_t e = 0; e < repeat; ++e) {
          query[(g * padded_rows + r) * repeat + e] = (scratch.key[g * repeat + e] ^ sign) & keep;
        }
      }
    }
    const Partial& partial = partials[h];
    Fill(partial.attention, rows * value_stride, 0);
    Fill(partial.peak, Most(padded_rows, kLanes), kNoPeak);
    Fill(partial.total, Most(padded_rows, kLanes), 0);
    Fill(scratch.history + h * kGranule * padded_rows, kGranule * padded_rows, 0);
  }

  const int64_t key_stride = problem.key_value_heads * problem.head_size * kElement;
  const int64_t value_row = problem.key_value_heads * problem.value_size * kElement;
  const auto key_rows = [&](const Tile& tile) {
    return static_cast<const char*>(plan.arrays.key) + tile.first_row * key_stride +
           unit.first_head * problem.head_size * kElement;
  };
  const auto value_rows = [&](const Tile& tile) {
    return static_cast<const char*>(plan.arrays.value) + tile.first_row * value_row +
           unit.first_head * problem.value_size * kElement;
  };

  for (Tile tile = Tile::At(plan, unit, 0), next; tile.count > 0; tile = next) {
    next = Tile::At(plan, unit, tile.index + 1);
    const int64_t positions = RoundUp(tile.count, kGranule);
    const int64_t steps = (tile.count + ValueProducts::kElements - 1) / ValueProducts::kElements;
    Ahead ahead(
        {key_rows(next), key_stride, unit.heads * problem.head_size * kElement, next.count},
        {value_rows(next), value_row, unit.heads * problem.value_size * kElement, next.count},
        unit.heads * (steps * Value::PackSteps(problem.value_size) +
                      (positions / kGranule * groups * ScoreSteps(padded_rows) +
                       steps * WeightSteps(rows, value_stride)) /
                          kLoopsPerStep));
    for (int64_t h = 0; h < unit.heads; ++h) {
      const Partial& partial = partials[h];
      float* const history = scratch.history + h * kGranule * padded_rows;
      float* const weights = scratch.weights + kGranule * padded_rows;

      const char* const keys = key_rows(tile) + h * problem.head_size * kElement;
      for (int64_t i = 0; i < tile.count; i += kGranule) {
        const char* block = keys + i * key_stride;
        int64_t stride = key_stride;
        if (!in_place) {
          for (int64_t p = 0; p < kGranule; ++p) {
            Key::RowWords(block + p * stride, problem.head_size, scratch.key + p * words);
          }
          block = reinterpret_cast<const char*>(scratch.key);
          stride = 4 * words;
        }
        // Float32 adds up at most kChain products one after another, then the sums.
        const int64_t chain = Key::kElementSize == 4 ? kChain : groups;
        for (int64_t g = 0; g < groups; g += chain) {
          Score<KeyProducts>(block + g * 4 * repeat, stride, Least(chain, groups - g),
                             scratch.query + h * query_size + g * repeat * padded_rows, g > 0,
                             weights + i * padded_rows, padded_rows, ahead);
        }
      }

      Softmax(plan, unit, tile, partial, scale, value_stride, scratch, history);
      __builtin_memcpy(scratch.weights, history, 4 * kGranule * padded_rows);
      if (tile.begin + tile.count == unit.end) {
        Fill(weights + tile.count * padded_rows, kGranule * padded_rows, 0);
      }
      SumBlocks(plan, unit, tile, partial, weights);
      __builtin_memcpy(history, weights + (tile.count - kGranule) * padded_rows,
                       4 * kGranule * padded_rows);

      const uint32_t* const weight_words =
          WeightWords<ValueProducts>(weights, tile.count, padded_rows, scratch.pairs);
      const char* const values = value_rows(tile) + h * problem.value_size * kElement;
      for (int64_t s = 0; s < steps; s += kSteps) {
        const int64_t count = Least(kSteps, steps - s);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t position = (s + i) * ValueProducts::kElements;
          const char* const row = values + position * value_row;
          Value::StepWords(row, position + 1 < tile.count ? row + value_row : nullptr,
                           problem.value_size, scratch.value + i * value_stride, ahead);
        }
        Weight<ValueProducts>(count, rows, weight_words + s * padded_rows, padded_rows,
                              scratch.value, value_stride, partial.attention, ahead);
      }
    }
  }

  // Several lanes hold the total of a row where a vector has several positions.
  for (int64_t h = 0; h < unit.heads; ++h) {
    float* const total = partials[h].total;
    for (int64_t r = 0; r < padded_rows; ++r) {
      for (int64_t lane = r + padded_rows; lane < kLanes; lane += padded_rows) {
        total[r] += total[lane];
      }
    }
  }
}

// Adds each row's scores of the blocks [first, last), times `factors`, to block_scores and, over
// the heads of the group, to the importance.
template <int run>
void AddScores(const Plan& plan, const Unit& unit, int64_t head, const float* scores,
               const float* factors, int64_t first, int64_t last, float* importance) {
  const int64_t padded_rows = unit.padded_rows, rows = unit.tokens * plan.group;
  for (int64_t j = first; j < last; j += run) {
    for (int64_t r = 0; r < rows; r += Most(plan.group, kLanes)) {
      Float of_block[run];
      for (int b = 0; b < run; ++b) {
        Float sum = {};
        if (j + b < last) {
          for (int64_t g = 0; g < plan.group; g += kLanes) {
            const float* const source = scores + (j - first + b) * padded_rows + r + g;
            sum += Load<Float>(source) * Load<Float>(factors + r + g);
          }
        }
        of_block[b] = sum;
      }
      const Float sums = FoldRuns<run>(of_block);
      float lanes[kLanes];
      Store(lanes, sums);
      for (int64_t lane = 0; lane < kLanes && r + lane < rows; lane += run) {
        const int64_t token = (r + lane) / plan.group;
        for (int64_t b = 0; b < run && j + b < last; ++b) {
          importance[token * unit.num_blocks + j + b] += lanes[lane + b];
        }
      }
    }
  }
  if (plan.arrays.block_scores == nullptr) return;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t query_row =
        (unit.first_row + r / plan.group) * plan.problem.heads + head * plan.group + r % plan.group;
    float* const target = plan.arrays.block_scores + query_row * plan.max_blocks;
    for (int64_t j = first; j < last; ++j) {
      target[j] += scores[(j - first) * padded_rows + r] * factors[r];
    }
  }
}

// Type is that of the values, whose order the partials have, and Out that of the attention.
template <class Type, class Out>
void Merge(const Plan& plan, const Unit& unit, int64_t head, int64_t splits,
           int64_t pages_per_split, const Partial* partials, float* importance, float* peak,
           float* total) {
  const Problem& problem = plan.problem;
  const int64_t padded_rows = unit.padded_rows, rows = unit.tokens * plan.group;
  const int64_t value_stride = PaddedWords(problem.value_size);
  const int64_t vectors_end = Most(padded_rows, kLanes);

  // Weigh each split against the overall peak; its total becomes its share of the attention.
  for (int64_t r = 0; r < vectors_end; r += kLanes) {
    Float all = Set(kNoPeak), sum = {};
    for (int64_t s = 0; s < splits; ++s) {
      all = Max(Load<Float>(partials[s * unit.heads].peak + r), all);
    }
    for (int64_t s = 0; s < splits; ++s) {
      const Partial& partial = partials[s * unit.heads];
      sum += Load<Float>(partial.total + r) * Exp2(Load<Float>(partial.peak + r) - all);
    }
    const Float inverse = sum == 0.0f ? Float{} : 1.0f / sum;
    for (int64_t s = 0; s < splits; ++s) {
      const Partial& partial = partials[s * unit.heads];
      Store(partial.total + r, Exp2(Load<Float>(partial.peak + r) - all) * inverse);
    }
    Store(peak + r, all);
    Store(total + r, sum);
  }

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = unit.first_row + r / plan.group;
    const int64_t query_head = head * plan.group + r % plan.group;
    char* const target = static_cast<char*>(plan.arrays.attention) +
                         (row * problem.heads + query_head) * problem.value_size *
                             static_cast<int64_t>(sizeof(typename Out::Bits));
    for (int64_t c = 0; c < value_stride; c += 2 * kLanes) {
      Float a = {}, b = {};
      for (int64_t s = 0; s < splits; ++s) {
        const Partial& partial = partials[s * unit.heads];
        const float* const source = partial.attention + r * value_stride + c;
        a += Load<Float>(source) * partial.total[r];
        b += Load<Float>(source + kLanes) * partial.total[r];
      }
      StoreSome<Type, Out>(target + c * sizeof(typename Out::Bits), problem.value_size - c, a, b);
    }
  }

  float factors[kMaxRows];
  for (int64_t s = 0; s < splits; ++s) {
    const Partial& partial = partials[s * unit.heads];
    Unit part = unit;
    part.begin = s * pages_per_split * problem.page_size;
    part.end = Least(unit.length, part.begin + pages_per_split * problem.page_size);
    int64_t first = partial.first_block;
    for (Tile tile = Tile::At(plan, part, 0); tile.count > 0;
         tile = Tile::At(plan, part, tile.index + 1)) {
      const float* const tile_peaks = partial.tile_peaks + tile.index * padded_rows;
      for (int64_t r = 0; r < vectors_end; r += kLanes) {
        const Float sum = Load<Float>(total + r);
        const Float inverse = sum == 0.0f ? Float{} : 1.0f / sum;
        Store(factors + r, Exp2(Load<Float>(tile_peaks + r) - Load<Float>(peak + r)) * inverse);
      }
      const int64_t last = BlocksEnd(plan, part, partial, tile.begin + tile.count);
      const float* const scores = partial.scores + (first - partial.first_block) * padded_rows;
      const auto add = [&](auto run) {
        AddScores<decltype(run)::value>(plan, unit, head, scores, factors, first, last, importance);
      };
      switch (Least(plan.group, kLanes)) {
        case 1:
          add(std::integral_constant<int, 1>{});
          break;
        case 2:
          add(std::integral_constant<int, 2>{});
          break;
        case 4:
          add(std::integral_constant<int, 4>{});
          break;
        case 8:
          if constexpr (kLanes >= 8) add(std::integral_constant<int, 8>{});
          break;
        case 16:
          if constexpr (kLanes >= 16) add(std::integral_constant<int, 16>{});
          break;
      }
      first = last;
    }
  }
}

int64_t ScratchSize(const Plan& plan, int64_t heads, int64_t padded_rows) {
  return Scratch(plan, heads, padded_rows, nullptr).size;
}

void AttendAny(const Plan& plan, const Unit& unit, const Partial* partials, void* scratch) {
  switch (plan.problem.dtype) {
    case DataType::kBFloat16:
      // Weights are rounded for products of pairs; short rows would not average that away.
      return plan.problem.value_size < 16
                 ? Attend<BFloat16, BFloat16Products, FloatProducts>(plan, unit, partials, scratch)
                 : Attend<BFloat16, BFloat16Products, BFloat16Products>(plan, unit, partials,
                                                                        scratch);
    case DataType::kFloat16:
      return Attend<Float16, FloatProducts, FloatProducts>(plan, unit, partials, scratch);
    case DataType::kFloat32:
      return Attend<Float32, FloatProducts, FloatProducts>(plan, unit, partials, scratch);
  }
}

void MergeAny(const Plan& plan, const Unit& unit, int64_t head, int64_t splits,
              int64_t pages_per_split, const Partial* partials, float* importance, float* peak,
              float* total) {
  const auto merge = [&](auto merge_typed) {
    merge_typed(plan, unit, head, splits, pages_per_split, partials, importance, peak, total);
  };
  const bool same_type = plan.problem.attention_dtype == plan.problem.dtype;
  switch (plan.problem.dtype) {
    case DataType::kBFloat16:
      return merge(same_type ? Merge<BFloat16, BFloat16> : Merge<BFloat16, Float32>);
    case DataType::kFloat16:
      return merge(same_type ? Merge<Float16, Float16> : Merge<Float16, Float32>);
    case DataType::kFloat32:
      return merge(Merge<Float32, Float32>);
  }
}

}  // namespace

extern const Kernel kKernel;
#define JAX_NSA_STRING(name) #name
#define JAX_NSA_EXPANDED_STRING(name) JAX_NSA_STRING(name)
const Kernel kKernel = {JAX_NSA_EXPANDED_STRING(JAX_NSA_ISA), kLanes, ScratchSize, AttendAny,
                        MergeAny};

}  // namespace jax_nsa::cpu::JAX_NSA_ISA
