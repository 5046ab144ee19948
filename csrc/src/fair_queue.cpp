#include "xalign/fair_queue.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace xalign {

namespace {

__extension__ typedef __int128 int128;

constexpr std::int64_t kLargestSum = std::int64_t{1} << 60;
constexpr std::int64_t kLargestGiven = std::int64_t{1} << 61;

}  // namespace

FairQueue::FairQueue(std::vector<std::int64_t> weights, std::int64_t window) : window_(window) {
  if (window < 0 || window > kLargestSum) {
    throw std::invalid_argument("window=" + std::to_string(window) + " is outside 0..2^60.");
  }
  members_.reserve(weights.size());
  for (const std::int64_t weight : weights) {
    if (weight <= 0) throw std::invalid_argument("the weight " + std::to_string(weight) + " is not positive.");
    if (weight > kLargestSum - total_) throw std::invalid_argument("weights add up to more than 2^60.");
    total_ += weight;
    members_.push_back({weight});
  }
}

// Heaps have the last in order at the front, so these say what comes later.
bool FairQueue::later(const Ready& a, const Ready& b) {
  const int128 left = static_cast<int128>(a.deadline) * b.weight, right = static_cast<int128>(b.deadline) * a.weight;
  return left != right ? left > right : a.member > b.member;
}

bool FairQueue::after(const Waiting& a, const Waiting& b) {
  return a.from != b.from ? a.from > b.from : a.member > b.member;
}

void FairQueue::make_ready(std::size_t member) {
  const Member& m = members_[member];
  ready_.push_back({m.given + (window_ > 0 ? window_ : m.size), m.weight, member});
  std::push_heap(ready_.begin(), ready_.end(), later);
}

void FairQueue::offer(std::size_t member, std::int64_t size) {
  Member& m = members_.at(member);
  if (m.size >= 0) throw std::invalid_argument("member " + std::to_string(member) + " has a piece already.");
  if (size < 0 || (window_ > 0 && size > window_)) {
    throw std::invalid_argument("a piece of " + std::to_string(size) + " tokens is outside 0.." +
                                std::to_string(window_) + ".");
  }
  if (size > kLargestGiven - given_) throw std::overflow_error("pieces add up to more than 2^61 tokens.");
  m.size = size;
  ++offered_;
  // total * (given + size - window) < weight * (given of all + size) is when it may come. A piece of nothing may
  // always: where all have nothing to give, somebody has to come next.
  const int128 ahead = static_cast<int128>(total_) * (m.given + size - (window_ > 0 ? window_ : size));
  const int128 quota = static_cast<int128>(m.weight) * (given_ + size);
  if (ahead < quota || (window_ == 0 && size == 0)) {
    make_ready(member);
  } else {
    waiting_.push_back({static_cast<std::int64_t>(ahead / m.weight) - size + 1, member});
    std::push_heap(waiting_.begin(), waiting_.end(), after);
  }
}

std::size_t FairQueue::best() {
  if (members_.empty() || offered_ != members_.size()) throw std::logic_error("a member has no piece, or there is none.");
  while (!waiting_.empty() && waiting_.front().from <= given_) {
    const std::size_t member = waiting_.front().member;
    std::pop_heap(waiting_.begin(), waiting_.end(), after);
    waiting_.pop_back();
    make_ready(member);
  }
  // The quotas of all add up to what was given, so that not all of them can be a piece ahead.
  return ready_.at(0).member;
}

void FairQueue::take_best() {
  const std::size_t member = best();
  std::pop_heap(ready_.begin(), ready_.end(), later);
  ready_.pop_back();
  Member& m = members_[member];
  m.given += m.size;
  given_ += m.size;
  m.size = -1;
  --offered_;
}

}  // namespace xalign
