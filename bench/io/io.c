/* What the guest of the I/O benchmark runs: io CASE..., each of which prints
 *     BENCH <group> <case> <seconds> ok
 * Disk cases read or write a fixed number of blocks past the page cache; network cases speak with the
 * server and the client of `cargo xtask io`; cases of shared folders use files in /share. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MOST_DEPTH = 32, MIB = 1 << 20, FILES = 500, SMALL = 4096, CONNECTIONS = 300, ECHO_PORT = 7 };
static const char *server; /* ADDRESS:PORT */
static unsigned scale = 1; /* what all amounts are divided by */

static void die(const char *what) { fprintf(stderr, "io: %s: %s\n", what, strerror(errno)); exit(1); }
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec / 1e9; }
static uint64_t next_random(void) { static uint64_t x = 88172645463325252u; x ^= x << 13; x ^= x >> 7; return x ^= x << 17; }

/* ---- disks ---- */

struct job { int write, sequential, depth; size_t block; unsigned count; };

static void run_job(const char *device, struct job job) {
    int fd = open(device, O_DIRECT | (job.write ? O_RDWR : O_RDONLY));
    if (fd < 0) die(device);
    uint64_t blocks = lseek(fd, 0, SEEK_END) / job.block;
    aio_context_t context = 0;
    if (syscall(SYS_io_setup, MOST_DEPTH, &context)) die("io_setup");
    struct iocb requests[MOST_DEPTH];
    char *memory = aligned_alloc(4096, job.depth * job.block);
    memset(memory, 0x5a, job.depth * job.block);
    unsigned begun = 0, done = 0, count = job.count / scale;
    struct io_event events[MOST_DEPTH];
    int free_slots[MOST_DEPTH], slots = job.depth;
    for (int i = 0; i < slots; i++) free_slots[i] = i;
    while (done < count) {
        struct iocb *batch[MOST_DEPTH]; int n = 0;
        while (slots > 0 && begun < count) {
            int slot = free_slots[--slots];
            uint64_t block = job.sequential ? begun % blocks : next_random() % blocks;
            requests[slot] = (struct iocb){
                .aio_data = slot, .aio_lio_opcode = job.write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD, .aio_fildes = fd,
                .aio_buf = (uint64_t)(memory + slot * job.block), .aio_nbytes = job.block, .aio_offset = block * job.block,
            };
            batch[n++] = &requests[slot]; begun++;
        }
        for (int sent = 0; sent < n;) {
            long accepted = syscall(SYS_io_submit, context, n - sent, batch + sent);
            if (accepted <= 0) die("io_submit");
            sent += accepted;
        }
        long finished = syscall(SYS_io_getevents, context, 1, MOST_DEPTH, events, NULL);
        if (finished < 1) die("io_getevents");
        for (long i = 0; i < finished; i++) {
            if (events[i].res != (int64_t)job.block) { errno = events[i].res < 0 ? -events[i].res : EIO; die(device); }
            free_slots[slots++] = events[i].data; done++;
        }
    }
    syscall(SYS_io_destroy, context); close(fd); free(memory);
}

static const struct { const char *name; struct job job; } disk_cases[] = {
    {"randread-1", {0, 0, 1, 4096, 6000}},      {"randread-32", {0, 0, 32, 4096, 60000}},
    {"randwrite-1", {1, 0, 1, 4096, 6000}},     {"randwrite-32", {1, 0, 32, 4096, 60000}},
    {"read-128k", {0, 1, 4, 131072, 6144}},     {"write-128k", {1, 1, 4, 131072, 6144}},
};

/* ---- network: the server reads a byte that says what is wanted, and a number ---- */

static int connect_to_server(char command, uint64_t bytes) {
    struct sockaddr_in to = { .sin_family = AF_INET };
    char address[64]; snprintf(address, sizeof address, "%s", server);
    char *colon = strchr(address, ':'); *colon = 0;
    to.sin_port = htons(atoi(colon + 1)); inet_pton(AF_INET, address, &to.sin_addr);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (void *)&to, sizeof to)) die("connect");
    char head[9] = { command }; memcpy(head + 1, &bytes, 8);
    if (write(fd, head, 9) != 9) die("send");
    return fd;
}

static void send_bytes(void) {
    static char buffer[131072]; uint64_t left = 256u * MIB / scale;
    int fd = connect_to_server('s', left);
    while (left) { ssize_t n = write(fd, buffer, left < sizeof buffer ? left : sizeof buffer); if (n <= 0) die("send"); left -= n; }
    if (read(fd, buffer, 1) != 1) die("the server's answer");
    close(fd);
}

static void receive_bytes(void) {
    static char buffer[131072]; uint64_t left = 256u * MIB / scale;
    int fd = connect_to_server('r', left);
    while (left) { ssize_t n = read(fd, buffer, sizeof buffer); if (n <= 0) die("receive"); left -= n; }
    close(fd);
}

/* The time is that of the client's connections, which comes as a line of the last one. */
static void connections(void) {
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons(ECHO_PORT) };
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (void *)&at, sizeof at) || listen(fd, 128)) die("listen");
    unsigned count = CONNECTIONS / scale;
    printf("IO-CONNECT %u\n", count);
    for (unsigned i = 0; i < count; i++) {
        int peer = accept(fd, NULL, NULL); char byte;
        if (peer < 0 || read(peer, &byte, 1) != 1 || write(peer, &byte, 1) != 1) die("connection");
        close(peer);
    }
    close(fd);
}

/* ---- shared folders ---- */

static void file_name(char *name, unsigned i) { sprintf(name, "/share/file-%u", i); }
static void each_file(void (*action)(const char *)) { char name[64]; for (unsigned i = 0; i < FILES / scale; i++) { file_name(name, i); action(name); } }
static void create_one(const char *name) {
    static char bytes[SMALL]; int fd = open(name, O_CREAT | O_EXCL | O_WRONLY, 0644);
    if (fd < 0 || write(fd, bytes, SMALL) != SMALL || close(fd)) die(name);
}
static void stat_one(const char *name) { struct stat s; if (stat(name, &s) || s.st_size != SMALL) die(name); }
static void read_one(const char *name) {
    static char bytes[SMALL]; int fd = open(name, O_RDONLY);
    if (fd < 0 || read(fd, bytes, SMALL) != SMALL || close(fd)) die(name);
}
static void unlink_one(const char *name) { if (unlink(name)) die(name); }
static void forget(void) { /* what the guest has cached */
    int fd = open("/proc/sys/vm/drop_caches", O_WRONLY); if (fd < 0 || write(fd, "3", 1) != 1) die("drop_caches"); close(fd);
}
static void create_files(void) { each_file(create_one); }
static void stat_files(void) { forget(); each_file(stat_one); }
static void read_files(void) { forget(); each_file(read_one); }
static void unlink_files(void) { each_file(unlink_one); }
static void read_large(void) {
    static char bytes[131072]; int fd = open("/share/large", O_RDONLY); ssize_t n;
    if (fd < 0) die("/share/large");
    while ((n = read(fd, bytes, sizeof bytes)) > 0) {}
    if (n < 0) die("/share/large");
    close(fd);
}
static void write_large(void) {
    static char bytes[131072]; int fd = open("/share/new", O_CREAT | O_WRONLY | O_TRUNC, 0644);
    if (fd < 0) die("/share/new");
    for (unsigned i = 0; i < 1024 / scale; i++) if (write(fd, bytes, sizeof bytes) != sizeof bytes) die("/share/new");
    if (close(fd) || unlink("/share/new")) die("/share/new");
}

struct other { const char *name; void (*run)(void); };
static const struct other net_cases[] = { {"send", send_bytes}, {"receive", receive_bytes}, {0} };
static const struct other port_cases[] = { {"connections", connections}, {0} };
static const struct other share_cases[] = {
    {"create", create_files}, {"stat", stat_files}, {"read", read_files}, {"unlink", unlink_files},
    {"read-large", read_large}, {"write-large", write_large}, {0},
};

static void report(const char *group, const char *name, double start) {
    printf("BENCH %s %s/%s %.4f ok\n", group, group, name, now() - start);
}

static void run_all(const char *group, const struct other *cases) {
    for (; cases->name; cases++) { double start = now(); cases->run(); report(group, cases->name, start); }
}

/* io {scale NUMBER | disk GROUP DEVICE | net GROUP ADDRESS:PORT | port GROUP | share GROUP}... */
int main(int count, char **words) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int w = 1; w + 1 < count; w += 2) {
        const char *kind = words[w], *group = words[w + 1];
        if (!strcmp(kind, "scale")) {
            scale = atoi(group);
        } else if (!strcmp(kind, "disk")) {
            const char *device = words[++w + 1];
            for (unsigned i = 0; i < sizeof disk_cases / sizeof *disk_cases; i++) {
                double start = now(); run_job(device, disk_cases[i].job); report(group, disk_cases[i].name, start);
            }
        } else if (!strcmp(kind, "net")) {
            server = words[++w + 1];
            run_all(group, net_cases);
        } else {
            run_all(group, strcmp(kind, "port") ? share_cases : port_cases);
        }
    }
    return 0;
}
