// Which source gives the next sample where every sample counts the same: earliest deadline first, in exact integers.
//
// Every choice depends on the weights and on what was drawn before, never on how long the run will be, so a shorter run
// is the beginning of a longer one. Where samples differ in what they hold, blender.h counts it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace xalign {

// One source per sample such that after any k samples source j has given strictly less than one sample more or less
// than k * w / W, where w = weights[j] and W = sum(weights) (Tijdeman 1980, "The chairman assignment problem").
//
// As a schedule (Steiner and Yeomans 1993): sample i of source j (from 0) may not come before slot floor(i * W / w) + 1
// and must have come by slot ceil((i + 1) * W / w), slots counted from 1. A slot goes to the sample with the earliest
// deadline among those that may come, the lower source where deadlines are equal. Giving samples in the order of their
// deadlines the first free slot each makes the same schedule, and that is how it is computed: a stretch of slots at a
// time, without a queue, in time that does not depend on the number of sources. Memory is that of a stretch, not of
// the run.
class BlendOrder {
 public:
  // Throws std::invalid_argument if there is no source or more than 65,536, a weight is negative, all are zero, or
  // their sum overflows int64.
  BlendOrder(const std::int64_t* weights, std::size_t num_sources);

  // The sources of the next num_samples samples, after those of earlier calls; how they are divided into calls changes
  // nothing. Id: std::uint8_t, std::uint16_t or std::int32_t. Throws std::invalid_argument if num_samples is negative
  // or an id does not fit.
  template <typename Id>
  void fill(Id* order, std::int64_t num_samples);

  std::int64_t num_samples() const { return slots_; }

 private:
  // The next sample of a source: it may take the slots release..deadline.
  struct Source {
    std::int64_t release;
    std::int64_t floor;  // (samples + 1) * total / weight, rounded down ...
    std::uint64_t rest;  // ... and what is left over, in 1 / weight
    std::int64_t step;   // total / weight
    std::uint64_t step_rest;
    std::uint64_t weight;
    std::int32_t index;
  };
  using Job = std::uint64_t;

  template <typename Id>
  void fill_stretch(Id* order, std::uint32_t num_slots);
  void list_jobs(std::uint32_t num_slots);
  void sort_jobs();

  std::vector<Source> sources_;
  std::vector<std::uint16_t> indices_;
  std::size_t num_sources_;
  std::int64_t slots_ = 0;
  std::uint32_t stretch_;
  // Of one stretch, kept to be used again.
  std::vector<Source> last_;  // of every source, before its last job was listed
  std::vector<Job> jobs_, sorted_;
  std::size_t num_jobs_ = 0;
  std::vector<std::uint32_t> starts_;
  std::vector<std::pair<std::int64_t, Job>> late_;
  std::vector<std::uint64_t> free_;
};

// The whole order at once.
std::vector<std::int32_t> blend_order(const std::int64_t* weights, std::size_t num_sources, std::int64_t num_samples);

}  // namespace xalign
