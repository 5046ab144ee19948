// What the fuzzers share: chance, and calls that may be refused but only in ways that the headers name.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <stdexcept>

#include "check.h"
#include "xalign/permutation.h"

class Chance {
 public:
  explicit Chance(std::uint64_t seed) : random_(seed) {}
  std::int64_t below(std::int64_t bound) { return static_cast<std::int64_t>(random_.below(static_cast<std::uint64_t>(bound))); }
  bool one_in(std::int64_t many) { return below(many) == 0; }
  // Mostly near what is sensible, sometimes anything.
  std::int64_t number(std::int64_t sensible) {
    switch (below(6)) {
      case 0: return static_cast<std::int64_t>(random_.next());
      case 1: return -below(3) - 1;
      case 2: return std::numeric_limits<std::int64_t>::max() - below(3);
      default: return below(sensible + 3);
    }
  }

 private:
  xalign::Xoshiro256 random_;
};

inline std::int64_t refused = 0, passed = 0;

// Any of these is how the headers say no; std::bad_alloc and std::length_error are not, and neither is a crash.
template <typename Call>
void attempt(Call call) {
  try {
    call();
    ++passed;
  } catch (const std::invalid_argument&) {
    ++refused;
  } catch (const std::out_of_range&) {
    ++refused;
  } catch (const std::overflow_error&) {
    ++refused;
  } catch (const std::length_error& error) {
    std::fprintf(stderr, "more was asked for than there can be: %s\n", error.what());
    std::exit(1);
  } catch (const std::logic_error&) {
    ++refused;
  } catch (const std::runtime_error&) {
    ++refused;
  }
}

// Calls once(chance) for some seconds: program [SECONDS] [SEED].
template <typename Once>
int fuzz(int count, char** arguments, Once once) {
  const double seconds = count > 1 ? std::atof(arguments[1]) : 2.0;
  Chance chance(count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1);
  const auto begin = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); };
  std::int64_t rounds = 0;
  for (; elapsed() < seconds || rounds < 50; ++rounds) once(chance);
  std::printf("%lld rounds, %lld calls passed, %lld refused\n", static_cast<long long>(rounds),
              static_cast<long long>(passed), static_cast<long long>(refused));
  CHECK(passed > 0 && refused > 0);
  return 0;
}
