// Sockets between guest and host: `vsock echo PORT COUNT` gives what each of COUNT connections sends back to it;
// `vsock send CID PORT` sends its standard input and prints what comes back.

#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static int die(const char *what) {
    perror(what);
    return 1;
}

// Copies until the end; 0 if all went well.
static int copy(int from, int to) {
    static char bytes[65536];
    for (;;) {
        ssize_t count = read(from, bytes, sizeof bytes);
        if (count <= 0)
            return count < 0 ? die("read") : 0;
        for (ssize_t done = 0; done < count;) {
            ssize_t written = write(to, bytes + done, count - done);
            if (written < 0)
                return die("write");
            done += written;
        }
    }
}

static int echo(int listener, int count) {
    for (int n = 0; n < count; n++) {
        int peer = accept(listener, 0, 0);
        if (peer < 0)
            return die("accept");
        if (fork() == 0)
            exit(copy(peer, peer));
        close(peer);
    }
    int failed = 0, status;
    while (wait(&status) > 0)
        failed |= status;
    return failed != 0;
}

int main(int argc, char **argv) {
    struct sockaddr_vm at = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY};
    int made = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (argc != 4 || made < 0)
        return die("socket");
    if (strcmp(argv[1], "echo") == 0) {
        at.svm_port = atoi(argv[2]);
        if (bind(made, (struct sockaddr *)&at, sizeof at) || listen(made, 64))
            return die("listen");
        return echo(made, atoi(argv[3]));
    }
    at.svm_cid = atoi(argv[2]);
    at.svm_port = atoi(argv[3]);
    if (connect(made, (struct sockaddr *)&at, sizeof at))
        return die("connect");
    if (fork() == 0) {
        int failed = copy(0, made);
        shutdown(made, SHUT_WR);
        exit(failed);
    }
    int failed = copy(made, 1), status = 1;
    wait(&status);
    return failed || status;
}
