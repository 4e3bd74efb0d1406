// What every kernel is given beside its tensors.
#pragma once

#include "params.h"

namespace arrowhead {

struct Problem {
  TokenLayout layout;
  WorkShape shape;
  int heads;
  float scale_log2;  // softmax scale times log2(e): the kernels work with exp2
  unsigned* tickets;  // one counter, zero at the start of the launch
  const HeadTask* device_tasks;
  HeadTask tasks[kMaxHeads];

  ARROWHEAD_HD HeadTask task(int head) const {
    HeadTask task = device_tasks ? device_tasks[head] : tasks[head];
    task.mode = effective_mode(layout, task.mode);
    return task;
  }

  ARROWHEAD_HD Work find(const RunTable& table, int ticket) const {
    return table.find(ticket, shape, [this](int head) { return task(head).mode; });
  }
};

}  // namespace arrowhead
