// What training calls of C++. SCALAR is the type of memories and activations.
#include "scan.h"

extern "C" {
// `scratch`: scan_scratch elements for each thread
void scan_forward(const Rule *rule, const Scan<SCALAR> *scan, SCALAR *scratch, int threads) {
    train<SCALAR, forward_sequence<SCALAR>>(*rule, *scan, scratch, threads);
}

void scan_backward(const Rule *rule, const Scan<SCALAR> *scan, SCALAR *scratch, int threads) {
    train<SCALAR, backward_sequence<SCALAR>>(*rule, *scan, scratch, threads);
}

size_t scan_scratch(const Rule *rule) { return train_scratch<SCALAR>(*rule); }
}
