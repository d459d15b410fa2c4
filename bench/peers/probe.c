// What this machine can do at best, measured beside the decodes that are held against it. Compiled and run by probe.py.
//
//   probe read FIRST_CPU,SECOND_CPU,... SECONDS   bytes per second of reading memory, all cores together
//   probe peak CPU,... SECONDS                    multiply-adds per second of 8-bit integers, all cores together:
//                                                 256-bit maddubs + paddw (int16 accumulation), and VNNI where present
//
// One thread per core, pinned; each measures itself between two barriers; the answer is the median over passes.
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { max_cpus = 256, max_passes = 4096 };
static const size_t bytes_per_thread = (size_t)256 << 20;  // far beyond any last-level cache

typedef double (*Work)(int thread);  // one pass; returns bytes or multiply-adds done

static int num_threads, cpus[max_cpus];
static char *memory[max_cpus];
static pthread_barrier_t barrier;
static Work work;
static double seconds_wanted, rates[max_passes], done[max_cpus];
static int num_passes;
static volatile int is_last;
static volatile uint64_t sink;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

typedef uint64_t Words __attribute__((vector_size(64)));

static double read_memory(int thread) {
  const Words *p = (const Words *)memory[thread];
  Words sums[4] = {{0}};
  for (size_t i = 0; i < bytes_per_thread / sizeof(Words); i += 4)
    for (int j = 0; j < 4; j++) sums[j] += p[i + j];
  const Words sum = sums[0] + sums[1] + sums[2] + sums[3];
  uint64_t total = 0;
  for (int j = 0; j < 8; j++) total += sum[j];
  sink += total;
  return (double)bytes_per_thread;
}

#if defined(__x86_64__)
#include <immintrin.h>

enum { rounds = 1000000 };

// Named accumulators: gcc keeps an array of them in memory, and then it is stores that are measured.
#define EACH_10(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9)
#define EACH_20(DO) EACH_10(DO) DO(10) DO(11) DO(12) DO(13) DO(14) DO(15) DO(16) DO(17) DO(18) DO(19)

__attribute__((target("avx2"))) static double multiply_int16(int thread) {
  (void)thread;
  const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(2);
  __m256i product;
#define ZERO(k) __m256i s##k = _mm256_setzero_si256();
#define STEP(k)                                                               \
  __asm__ volatile("vpmaddubsw %2, %1, %0" : "=x"(product) : "x"(a), "x"(b)); \
  __asm__ volatile("vpaddw %1, %0, %0" : "+x"(s##k) : "x"(product));
#define KEEP(k) sink += (uint64_t)_mm256_extract_epi64(s##k, 0);
  EACH_10(ZERO)
  for (int i = 0; i < rounds; i++) { EACH_10(STEP) }
  EACH_10(KEEP)
  return 10.0 * rounds * 32;
#undef ZERO
#undef STEP
#undef KEEP
}

__attribute__((target("avx512f,avx512bw,avx512vnni"))) static double multiply_vnni(int thread) {
  (void)thread;
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(2);
#define ZERO(k) __m512i s##k = _mm512_setzero_si512();
#define STEP(k) __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(s##k) : "v"(a), "v"(b));
#define KEEP(k) sink += (uint64_t)_mm512_reduce_add_epi32(s##k);
  EACH_20(ZERO)
  for (int i = 0; i < rounds; i++) { EACH_20(STEP) }
  EACH_20(KEEP)
  return 20.0 * rounds * 64;
#undef ZERO
#undef STEP
#undef KEEP
}
#endif

static void *run_thread(void *argument) {
  const int thread = (int)(intptr_t)argument;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpus[thread], &set);
  sched_setaffinity(0, sizeof set, &set);
  double start = 0, pass = 0;
  if (work == read_memory) {
    memory[thread] = mmap(NULL, bytes_per_thread, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory[thread] == MAP_FAILED) exit(1);
    madvise(memory[thread], bytes_per_thread, MADV_HUGEPAGE);
    memset(memory[thread], thread + 1, bytes_per_thread);
  }
  while (!is_last) {
    pthread_barrier_wait(&barrier);
    if (thread == 0) {
      pass = now();
      if (num_passes == 0) start = pass;
    }
    done[thread] = work(thread);
    pthread_barrier_wait(&barrier);
    if (thread == 0) {
      double total = 0;
      for (int i = 0; i < num_threads; i++) total += done[i];
      rates[num_passes++] = total / (now() - pass);
      is_last = now() - start > seconds_wanted || num_passes == max_passes;
    }
    pthread_barrier_wait(&barrier);
  }
  return NULL;
}

static int ascending(const void *a, const void *b) {
  const double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double measure(Work what) {
  pthread_t threads[max_cpus];
  work = what, num_passes = 0, is_last = 0;
  pthread_barrier_init(&barrier, NULL, (unsigned)num_threads);
  for (int i = 0; i < num_threads; i++) pthread_create(&threads[i], NULL, run_thread, (void *)(intptr_t)i);
  for (int i = 0; i < num_threads; i++) pthread_join(threads[i], NULL);
  pthread_barrier_destroy(&barrier);
  qsort(rates, (size_t)num_passes, sizeof *rates, ascending);
  return rates[num_passes / 2];
}

int main(int argc, char **argv) {
  if (argc != 4) return 2;
  for (char *part = strtok(argv[2], ","); part && num_threads < max_cpus; part = strtok(NULL, ","))
    cpus[num_threads++] = atoi(part);
  seconds_wanted = atof(argv[3]);
  if (!strcmp(argv[1], "read")) {
    printf("{\"read\": %.6e}\n", measure(read_memory));
    return 0;
  }
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2")) return 3;
  printf("{\"int16\": %.6e", measure(multiply_int16));
  if (__builtin_cpu_supports("avx512vnni")) printf(", \"vnni\": %.6e", measure(multiply_vnni));
  printf("}\n");
  return 0;
#else
  return 3;
#endif
}
