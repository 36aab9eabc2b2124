// Work that the threads of the caller share, and the memory that each thread keeps.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "interface.h"

// Indices, and numbers multiplied, read and written, from which on several threads are worth waking for them.
constexpr int64_t MANY_INDICES = 1 << 17;
#ifndef MANY_NUMBERS
#define MANY_NUMBERS (1 << 20)
#endif

struct Parallel {
    int threads;
    Fork fork;
    bool awake;  // whether the threads are likely to wait for work still

    // Calls body(begin, end) on even ranges that cover [0, count), each range on some thread.
    template <class Body>
    void run(int64_t count, const Body& body) const {
        const int64_t ranges = std::min<int64_t>(threads, count);
        if (ranges <= 1) {
            if (count) body(int64_t(0), count);
            return;
        }
        struct Task {
            const Body& body;
            int64_t count, ranges;
            std::atomic<int64_t> next{0};
            std::atomic<bool> failed{false};
        } task{body, count, ranges};
        // A pool may grant fewer threads than asked for, so every thread takes ranges until none is left.
        auto work = [](void* data) {
            Task& task = *static_cast<Task*>(data);
            try {
                for (int64_t i; (i = task.next++) < task.ranges;)
                    task.body(task.count * i / task.ranges, task.count * (i + 1) / task.ranges);
            } catch (const std::bad_alloc&) {
                task.failed = true;
            }
        };
        if (fork) {
            fork(work, &task, unsigned(ranges), 0);
        } else {
            std::vector<std::thread> pool;
            for (int64_t i = 1; i < ranges; ++i) pool.emplace_back(work, &task);
            work(&task);
            for (std::thread& thread : pool) thread.join();
        }
        if (task.failed) throw std::bad_alloc();
    }

    // This thread alone, unless there is `enough` work: to wake another takes as long as some 100,000 operations, and to
    // reach one that is awake an eighth of that.
    Parallel only_if(int64_t work, int64_t enough) const {
        return {work > (awake ? enough / 8 : enough) ? threads : 1, fork, awake};
    }
};

// What a thread keeps memory for: the planes and sums of its own strip, a strip that all threads share, and where each
// nonzero reads.
enum Use { OWN, SHARED, READS };

// Memory, which is in pages of its own where it is large: on the heap it would lie between blocks that are freed, and
// keep them from the system. It lies on huge pages where the system has them, because the kernels read it at random.
class Memory {
public:
    Memory() = default;
    Memory(const Memory&) = delete;
    ~Memory() { give_back(); }

    void* at_least(size_t need) {
        if (need > size) {
            give_back();
            take(need);
        }
        return begin;
    }

private:
    static constexpr size_t LINE = 64, LARGE = size_t(256) << 10, HUGE_PAGE = size_t(2) << 20;
    void *begin = nullptr, *mapped = nullptr;
    size_t size = 0, length = 0;

    void take(size_t need) {
#ifdef MADV_HUGEPAGE
        if (need >= LARGE) return map(need);
#endif
        begin = std::aligned_alloc(LINE, (need + LINE - 1) / LINE * LINE);
        if (!begin) throw std::bad_alloc();
        size = need;
    }

#ifdef MADV_HUGEPAGE
    void map(size_t need) {
        need = (need + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        const size_t all = need + HUGE_PAGE;
        void* const got = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (got == MAP_FAILED) throw std::bad_alloc();
        mapped = got, length = all, size = need;
        begin = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(got) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
        madvise(begin, need, MADV_HUGEPAGE);
    }
#endif

    void give_back() {
#ifdef MADV_HUGEPAGE
        if (mapped) munmap(mapped, length);
#endif
        if (!mapped) std::free(begin);
        begin = mapped = nullptr, size = length = 0;
    }
};

// Memory that a thread keeps from call to call, for each use apart.
template <class S, Use USE>
S* scratch(int64_t count) {
    thread_local Memory memory;
    return static_cast<S*>(memory.at_least(size_t(count) * sizeof(S)));
}
