// What training calls of C++. SCALAR is the type of memories and activations.
#include "scan.h"

extern "C" {
void scan_forward(const Rule *rule, const Scan<SCALAR> *scan, SCALAR *scratch) { train_forward(*rule, *scan, scratch); }
void scan_backward(const Rule *rule, const Scan<SCALAR> *scan, SCALAR *scratch) { train_backward(*rule, *scan, scratch); }
size_t scan_scratch(const Rule *rule) { return train_scratch<SCALAR>(*rule); }
}
