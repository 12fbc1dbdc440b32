// The kernel: attention, block scores and their merge, for the instruction set that this file is
// compiled for.
//
// Scores lie transposed, [position][row], so that the rows of a panel fill the lanes of vectors and
// softmax and window sums are vertical. A panel of fewer rows than lanes is padded to a power of
// two, and a vector holds several positions.

#include "cpu/kernel.h"

#include "cpu/ahead.h"
#include "cpu/multiply.h"
#include "cpu/simd.h"
#if defined(__AMX_BF16__) || defined(JAX_NSA_EMULATED_AMX)
#define JAX_NSA_TILES
#include "cpu/tiles.h"
#endif

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

constexpr int64_t kGranule = kPositionGranule;
constexpr float kNoPeak = -1e38f;  // below every score, and finite
constexpr float kLog2E = 1.44269504f;

constexpr int64_t RoundUp(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

constexpr int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t Most(int64_t a, int64_t b) { return a > b ? a : b; }

void Fill(float* target, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) target[i] = value;
}

// Words of a row of `size` elements in scratch memory, by any multiplier.
constexpr int64_t PaddedWords(int64_t size) { return RoundUp(size, 2 * kLanes); }

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

// How rows of elements become words for a multiplier of `elements` elements in a word.
template <class Type, int elements>
struct Operands {
  static constexpr bool kPairs = elements == 2;
  static constexpr int64_t kElementSize = sizeof(typename Type::Bits);
  // Whether the words of a row are its bytes in memory.
  static constexpr bool kInPlace = kElementSize * elements == 4;
  static constexpr int64_t kChunk = 2 * kLanes;  // elements that are converted at once

  static constexpr int64_t RowWords(int64_t size) { return RoundUp(size, kChunk) / elements; }

  // Writes the RowWords(size) words of a row, zeros past its end; keys and queries in one order.
  static void PackRow(const char* row, int64_t size, uint32_t* words) {
    for (int64_t c = 0; c < size; c += kChunk) {
      if constexpr (kPairs) {
        Store(words + c / 2, LoadPairs(row + c * kElementSize, size - c));
      } else {
        Convert(row + c * kElementSize, size - c, words + c);
      }
    }
  }

  static constexpr int64_t StepWords(int64_t size) { return RoundUp(size, kChunk); }

  // Writes the StepWords(size) words of a step, in the order of Type::Load: one value row, or two,
  // of which the second may be null.
  static void PackStep(const char* first, const char* second, int64_t size, uint32_t* words) {
    for (int64_t c = 0; c < size; c += kChunk) {
      if constexpr (kPairs) {
        const Word low = LoadPairs(first + c * kElementSize, size - c);
        const Word high = second ? LoadPairs(second + c * kElementSize, size - c) : Word{};
        Store(words + c, (low & 0xffff) | (high << 16));
        Store(words + c + kLanes, (low >> 16) | (high & 0xffff0000));
      } else {
        Convert(first + c * kElementSize, size - c, words + c);
      }
    }
  }

  // How many steps of Ahead take the time of PackStep.
  static constexpr int64_t PackSteps(int64_t size) { return StepWords(size) / (2 * kChunk) + 1; }

 private:
  static void Convert(const char* source, int64_t count, uint32_t* words) {
    Float a, b;
    LoadSome<Type>(source, count, &a, &b);
    Store(words, a);
    Store(words + kLanes, b);
  }

  static Word LoadPairs(const char* source, int64_t count) {
    if (count >= kChunk) return Load<Word>(source);
    typename Type::Bits elements_here[kChunk] = {};
    __builtin_memcpy(elements_here, source, count * kElementSize);
    return Load<Word>(elements_here);
  }
};

// The memory of one unit.
struct Scratch {
  uint32_t* queries;  // [heads][words][padded rows], see Queries
  float* history;     // [heads][kGranule][padded rows], weights of the positions before the tile
  float* weights;     // [kGranule + tile + kGranule][padded rows]: history; scores, then weights
  uint32_t* pairs;    // [steps of a tile][padded rows], weights as words
  uint32_t* keys;     // [kGranule][words]
  uint32_t* values;   // [kMostSteps][words]
  float* factors;     // [padded rows]
  int64_t size;       // bytes

  Scratch(const Plan& plan, int64_t heads, int64_t padded_rows, void* memory) {
    char* next = static_cast<char*>(memory);
    const auto take = [&](int64_t words) {
      char* const taken = next;
      next += RoundUp(4 * words, kAlignment);
      return taken;
    };
    const auto floats = [&](int64_t n) { return reinterpret_cast<float*>(take(n)); };
    const auto words = [&](int64_t n) { return reinterpret_cast<uint32_t*>(take(n)); };
    const int64_t row_words = PaddedWords(plan.problem.head_size);
    queries = words(heads * row_words * padded_rows);
    history = floats(heads * kGranule * padded_rows);
    // Sums over few rows read a vector past the end.
    weights = floats((kGranule + plan.tile_size + kGranule) * padded_rows + kLanes);
    pairs = words(RoundUp(plan.tile_size, kMostSteps) * padded_rows);
    keys = words(kGranule * row_words);
    values = words(kMostSteps * PaddedWords(plan.problem.value_size));
    factors = floats(Most(padded_rows, kLanes));
    size = next - static_cast<char*>(memory);
  }
};

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

inline int64_t BlocksBegin(const Plan& plan, const Unit& unit, const Partial& partial,
                           const Tile& tile) {
  return tile.index == 0 ? partial.first_block : BlocksEnd(plan, unit, partial, tile.begin);
}

// Attends with the panels of one unit. KeysBy and ValuesBy are the multipliers.
template <class Type, class KeysBy, class ValuesBy>
class Attention {
 public:
  Attention(const Plan& plan, const Unit& unit, const Partial* partials, void* memory)
      : plan_(plan),
        unit_(unit),
        partials_(partials),
        scratch_(plan, unit.heads, unit.padded_rows, memory),
        weights_(scratch_.weights + kGranule * unit.padded_rows) {
    const Problem& problem = plan.problem;
    const int64_t granule = 4 * KeysBy::WordGranule(padded_rows_);
    in_place_ = Key::kInPlace && head_size_ * kElement % granule == 0;
    key_words_ = in_place_ ? head_size_ * kElement / 4 : Key::RowWords(head_size_);
    key_stride_ = problem.key_value_heads * head_size_ * kElement;
    value_stride_ = problem.key_value_heads * value_size_ * kElement;
  }

  void Run() {
    PackQueries();
    for (int64_t h = 0; h < unit_.heads; ++h) Begin(h);
    for (Tile tile = Tile::At(plan_, unit_, 0), next; tile.count > 0; tile = next) {
      next = Tile::At(plan_, unit_, tile.index + 1);
      Ahead ahead(
          {KeyRow(next, 0), key_stride_, unit_.heads * head_size_ * kElement, next.count},
          {ValueRow(next, 0), value_stride_, unit_.heads * value_size_ * kElement, next.count},
          StepsAhead(tile));
      for (int64_t h = 0; h < unit_.heads; ++h) {
        Score(tile, h, ahead);
        Softmax(tile, h);
        SumBlocks(tile, h);
        Weigh(tile, h, ahead);
      }
    }
    for (int64_t h = 0; h < unit_.heads; ++h) End(h);
  }

 private:
  using Key = Operands<Type, KeysBy::kElements>;
  using Value = Operands<Type, ValuesBy::kElements>;
  static constexpr int64_t kElement = Key::kElementSize;

  // The query heads of the panels as words, their scale but for its size folded in.
  void PackQueries() {
    // A negative scale changes their sign, so that the greatest product is the peak; a zero one
    // clears them.
    const float scale = plan_.problem.scale;
    const uint32_t sign = scale < 0 ? (Key::kPairs ? 0x80008000u : 0x80000000u) : 0;
    const uint32_t keep = scale == 0 ? 0 : ~0u;
    const int64_t repeat = KeysBy::Repeat(padded_rows_);
    for (int64_t h = 0; h < unit_.heads; ++h) {
      uint32_t* const queries = scratch_.queries + h * key_words_ * padded_rows_;
      for (int64_t i = 0; i < key_words_ * padded_rows_; ++i) queries[i] = 0;
      for (int64_t r = 0; r < rows_; ++r) {
        const int64_t head = (unit_.first_head + h) * plan_.group + r % plan_.group;
        const int64_t row = (unit_.first_row + r / plan_.group) * plan_.problem.heads + head;
        uint32_t* const words = scratch_.keys;
        Key::PackRow(static_cast<const char*>(plan_.arrays.query) + row * head_size_ * kElement,
                     head_size_, words);
        for (int64_t w = 0; w < key_words_; w += repeat) {
          for (int64_t e = 0; e < repeat; ++e) {
            queries[w * padded_rows_ + r * repeat + e] = (words[w + e] ^ sign) & keep;
          }
        }
      }
    }
  }

  void Begin(int64_t h) {
    const Partial& partial = partials_[h];
    Fill(partial.attention, padded_rows_ * columns_, 0);
    Fill(partial.peak, Most(padded_rows_, kLanes), kNoPeak);
    Fill(partial.total, Most(padded_rows_, kLanes), 0);
    Fill(scratch_.history + h * kGranule * padded_rows_, kGranule * padded_rows_, 0);
  }

  // Scores of all positions of the tile, and of those up to a multiple of kGranule.
  void Score(const Tile& tile, int64_t h, Ahead& ahead) {
    const Queries queries = {scratch_.queries + h * key_words_ * padded_rows_, padded_rows_};
    const char* const first = KeyRow(tile, h);
    const int64_t count = RoundUp(tile.count, kGranule);
    if (in_place_) {
      KeysBy::Score({first, key_stride_, count, key_words_}, queries, weights_, ahead);
      return;
    }
    for (int64_t i = 0; i < count; i += kGranule) {
      for (int64_t p = 0; p < kGranule; ++p) {
        Key::PackRow(first + (i + p) * key_stride_, head_size_, scratch_.keys + p * key_words_);
      }
      KeysBy::Score(
          {reinterpret_cast<const char*>(scratch_.keys), 4 * key_words_, kGranule, key_words_},
          queries, weights_ + i * padded_rows_, ahead);
    }
  }

  // Turns scores into weights relative to the greatest score so far; what was summed before is
  // rescaled if that grew.
  void Softmax(const Tile& tile, int64_t h) {
    const Partial& partial = partials_[h];
    const float scale =
        plan_.problem.scale == 0 ? 1 : __builtin_fabsf(plan_.problem.scale) * kLog2E;
    Mask(tile);
    const int64_t end = RoundUp(tile.count, kGranule) * padded_rows_;
    const int64_t stride = Most(padded_rows_, kLanes);
    bool grew = false;
    for (int64_t v = 0; v < stride; v += kLanes) {
      Float peak = Set(-__builtin_inff());
      for (int64_t i = v; i < end; i += stride) peak = Max(Load<Float>(weights_ + i), peak);
      // Where a vector holds several positions: the greatest of each row, in all its lanes.
      for (int64_t turn = padded_rows_; turn < kLanes; turn *= 2) {
        float twice[2 * kLanes];
        Store(twice, peak);
        Store(twice + kLanes, peak);
        peak = Max(Load<Float>(twice + turn), peak);
      }
      const Float old_peak = Load<Float>(partial.peak + v);
      peak = Max(peak * scale, old_peak);
      const Float factor = Exp2(old_peak - peak);
      for (int lane = 0; lane < kLanes; ++lane) grew |= factor[lane] != 1.0f;

      Float total = {};
      for (int64_t i = v; i < end; i += stride) {
        const Float weight = Exp2(Load<Float>(weights_ + i) * scale - peak);
        Store(weights_ + i, weight);
        total += weight;
      }
      Store(partial.total + v, Load<Float>(partial.total + v) * factor + total);
      Store(partial.peak + v, peak);
      Store(scratch_.factors + v, factor);
    }
    __builtin_memcpy(partial.tile_peaks + tile.index * padded_rows_, partial.peak,
                     4 * padded_rows_);
    if (grew) Rescale(partial, scratch_.history + h * kGranule * padded_rows_);
  }

  // Scores of what a row does not see become -inf: positions past the end, and the last of the
  // sequence for the rows of early tokens.
  void Mask(const Tile& tile) {
    const float hidden = -__builtin_inff();
    Fill(weights_ + tile.count * padded_rows_,
         (RoundUp(tile.count, kGranule) - tile.count) * padded_rows_, hidden);
    if (tile.begin + tile.count == unit_.length) {
      Fill(weights_ + (tile.count - 1) * padded_rows_, unit_.early * plan_.group, hidden);
    }
  }

  void Rescale(const Partial& partial, float* history) {
    for (int64_t r = 0; r < rows_; ++r) {
      const float factor = scratch_.factors[r];
      if (factor == 1.0f) continue;
      float* const row = partial.attention + r * columns_;
      for (int64_t c = 0; c < columns_; c += kLanes) Store(row + c, Load<Float>(row + c) * factor);
    }
    for (int64_t i = 0; i < kGranule; ++i) {
      for (int64_t r = 0; r < padded_rows_; ++r) {
        history[i * padded_rows_ + r] *= scratch_.factors[r];
      }
    }
  }

  // Sums the weights into the blocks that close in the tile.
  void SumBlocks(const Tile& tile, int64_t h) {
    const Partial& partial = partials_[h];
    float* const history = scratch_.history + h * kGranule * padded_rows_;
    __builtin_memcpy(scratch_.weights, history, 4 * kGranule * padded_rows_);
    if (tile.begin + tile.count == unit_.end) {
      Fill(weights_ + tile.count * padded_rows_, kGranule * padded_rows_, 0);
    }
    const int64_t last = BlocksEnd(plan_, unit_, partial, tile.begin + tile.count);
    for (int64_t j = BlocksBegin(plan_, unit_, partial, tile); j < last; ++j) {
      const float* const closing =
          weights_ + (plan_.strides_per_select_block * (j + 1) - tile.begin) * padded_rows_;
      float* const scores = partial.scores + (j - partial.first_block) * padded_rows_;
      // Of few rows, the lanes past them are of later positions; the next block overwrites them.
      for (int64_t r = 0; r < padded_rows_; r += kLanes) {
        Float sum = {};
        for (int64_t o = 0; o < plan_.num_taps; ++o) {
          sum += plan_.weights[o] * Load<Float>(closing - o * padded_rows_ + r);
        }
        Store(scores + r, sum);
      }
    }
    __builtin_memcpy(history, weights_ + (tile.count - kGranule) * padded_rows_,
                     4 * kGranule * padded_rows_);
  }

  // Adds the weighted values of the tile.
  void Weigh(const Tile& tile, int64_t h, Ahead& ahead) {
    const int64_t steps = Steps(tile);
    const uint32_t* const weights = WeightWords(tile);
    const char* const first = ValueRow(tile, h);
    for (int64_t s = 0; s < steps; s += kMostSteps) {
      const int64_t count = Least(kMostSteps, steps - s);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t position = (s + i) * ValuesBy::kElements;
        const char* const row = first + position * value_stride_;
        Value::PackStep(row, position + 1 < tile.count ? row + value_stride_ : nullptr, value_size_,
                        scratch_.values + i * columns_);
        ahead.Step(Value::PackSteps(value_size_));
      }
      const int64_t whole = RoundUp(count, ValuesBy::kStepGranule);
      for (int64_t i = count * columns_; i < whole * columns_; ++i) scratch_.values[i] = 0;
      ValuesBy::Weigh({weights + s * padded_rows_, padded_rows_, scratch_.values, columns_, count},
                      rows_, partials_[h].attention, ahead);
    }
  }

  // Weights as words, [step][padded rows]: themselves, or rounded in pairs of positions.
  const uint32_t* WeightWords(const Tile& tile) {
    if constexpr (!Value::kPairs) {
      return reinterpret_cast<const uint32_t*>(weights_);
    } else {
      switch (padded_rows_) {
        case 1:
          PairWeights<1>(tile);
          break;
        case 2:
          PairWeights<2>(tile);
          break;
        case 4:
          PairWeights<4>(tile);
          break;
        case 8:
          PairWeights<8>(tile);
          break;
        default:
          PairWeights<kLanes>(tile);
      }
      const int64_t whole = RoundUp(Steps(tile), ValuesBy::kStepGranule);
      for (int64_t i = RoundUp(tile.count, kGranule) / 2 * padded_rows_; i < whole * padded_rows_;
           ++i) {
        scratch_.pairs[i] = 0;
      }
      return scratch_.pairs;
    }
  }

  // With `rows` rows to a position in a vector.
  template <int rows>
  void PairWeights(const Tile& tile) {
    const int64_t positions = RoundUp(tile.count, kGranule);
    const int64_t apart = Most(padded_rows_, kLanes);  // from even vectors to odd ones
    for (int64_t s = 0; s < positions * padded_rows_; s += 2 * apart) {
      for (int64_t r = 0; r < apart; r += kLanes) {
        const Float a = Load<Float>(weights_ + s + r), b = Load<Float>(weights_ + s + r + apart);
        Store(scratch_.pairs + s / 2 + r, Type::template RoundPairs<rows>(a, b));
      }
    }
  }

  // Several lanes hold the total of a row where a vector holds several positions.
  void End(int64_t h) {
    float* const total = partials_[h].total;
    for (int64_t r = 0; r < padded_rows_; ++r) {
      for (int64_t lane = r + padded_rows_; lane < kLanes; lane += padded_rows_) {
        total[r] += total[lane];
      }
    }
  }

  static int64_t Steps(const Tile& tile) {
    return RoundUp(tile.count, ValuesBy::kElements) / ValuesBy::kElements;
  }

  // How many steps ahead the work on a tile takes.
  int64_t StepsAhead(const Tile& tile) const {
    const int64_t steps = Steps(tile);
    const Keys keys = {nullptr, 0, RoundUp(tile.count, kGranule), key_words_};
    return unit_.heads *
           (KeysBy::ScoreSteps(keys, padded_rows_) + steps * Value::PackSteps(value_size_) +
            ValuesBy::WeighSteps(rows_, columns_, steps));
  }

  const char* KeyRow(const Tile& tile, int64_t h) const {
    return static_cast<const char*>(plan_.arrays.key) + tile.first_row * key_stride_ +
           (unit_.first_head + h) * head_size_ * kElement;
  }

  const char* ValueRow(const Tile& tile, int64_t h) const {
    return static_cast<const char*>(plan_.arrays.value) + tile.first_row * value_stride_ +
           (unit_.first_head + h) * value_size_ * kElement;
  }

  const Plan& plan_;
  const Unit& unit_;
  const Partial* const partials_;
  const Scratch scratch_;
  float* const weights_;  // of the tile's first position
  const int64_t padded_rows_ = unit_.padded_rows;
  const int64_t rows_ = unit_.tokens * plan_.group;
  const int64_t head_size_ = plan_.problem.head_size;
  const int64_t value_size_ = plan_.problem.value_size;
  const int64_t columns_ = PaddedWords(value_size_);  // of partials
  bool in_place_;                                     // keys are read where they lie
  int64_t key_words_;                                 // of a key, as it is read
  int64_t key_stride_;                                // bytes, in the pool
  int64_t value_stride_;
};

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

template <class Type, class KeysBy, class ValuesBy>
void Attend(const Plan& plan, const Unit& unit, const Partial* partials, void* scratch) {
  Attention<Type, KeysBy, ValuesBy>(plan, unit, partials, scratch).Run();
}

using ByFloats = Vectors<FloatProducts>;
// Sums of many products hold float32's accuracy if they are added up in parts.
using ByFloatsInParts = Vectors<FloatProducts, 32>;
using ByPairs = Vectors<BFloat16Products>;

void AttendBFloat16(const Plan& plan, const Unit& unit, const Partial* partials, void* scratch) {
  // Weights are rounded for products of pairs; short rows of values would not average that away.
  const bool exact = plan.problem.value_size < 16;
#if defined(JAX_NSA_TILES)
  const TileScope tiles(unit.padded_rows);
  // Values need a tile of rows to pay.
  const auto attend = exact                          ? Attend<BFloat16, Tiles, ByFloats>
                      : unit.padded_rows < kTileRows ? Attend<BFloat16, Tiles, ByPairs>
                                                     : Attend<BFloat16, Tiles, Tiles>;
#else
  const auto attend =
      exact ? Attend<BFloat16, ByPairs, ByFloats> : Attend<BFloat16, ByPairs, ByPairs>;
#endif
  attend(plan, unit, partials, scratch);
}

void AttendAny(const Plan& plan, const Unit& unit, const Partial* partials, void* scratch) {
  switch (plan.problem.dtype) {
    case DataType::kBFloat16:
      return AttendBFloat16(plan, unit, partials, scratch);
    case DataType::kFloat16:
      return Attend<Float16, ByFloats, ByFloats>(plan, unit, partials, scratch);
    case DataType::kFloat32:
      return Attend<Float32, ByFloatsInParts, ByFloats>(plan, unit, partials, scratch);
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
