#include "core/worker.h"

#include <atomic>

#include "base/error.h"
#include "catch.h"

using namespace kiln;

TEST_CASE("a worker does jobs in order beside its owner, and hands over their errors") {
  std::vector<int> done;
  std::atomic<bool> go = false;
  Worker worker;
  worker.post([&] {
    while (!go) std::this_thread::yield();
    done.push_back(1);
  });
  CHECK(done.empty());  // post() did not wait
  go = true;
  worker.post([&] { done.push_back(2); });
  worker.wait();
  CHECK(done == std::vector<int>{1, 2});
  worker.post([] { fail(ExitCode::data, "torn"); });
  CHECK_THROWS_WITH(worker.wait(), "torn");
  worker.wait();  // once
  worker.post([] { fail(ExitCode::data, "torn again"); });
  CHECK_THROWS_WITH(worker.post([&] { done.push_back(3); }), "torn again");
  worker.wait();
  CHECK(done.size() == 2);
}
