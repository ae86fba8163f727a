// A small program that is compiled, linked and run.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(void) {
    enum { limit = 4000000 };
    char *composite = calloc(1, limit);
    unsigned long count = 0, sum = 0;
    for (long i = 2; i < limit; i++) {
        if (composite[i])
            continue;
        count++;
        sum += i;
        for (long j = i * i; j < limit; j += i)
            composite[j] = 1;
    }
    printf("%lu primes, their sum is %lu, %.6f\n", count, sum, (double)sum / count);
    return 0;
}
