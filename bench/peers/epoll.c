/* One thread, one level-triggered epoll loop: close to the lowest possible cost of such a service.
 *
 * What one read brings is answered by one send. While replies of a client wait to be sent, nothing more is read from it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define READ_SIZE 65536
#define UNKNOWN "ERR unknown command\n"

struct client {
    int fd;
    char *rest;    /* the unfinished line */
    size_t rest_size;
    char *pending; /* replies that did not fit into the kernel's buffer */
    size_t pending_size;
};

static int epoll;
static long clients;
unsigned long commands; /* never read here; not static, so that the compiler keeps it */
static char who[24], where[40];
static size_t who_size;
static char received[READ_SIZE];
/* A line of one byte has the longest reply for its size, 20 bytes; an unfinished line may complete WHERE. */
static char replies[READ_SIZE * (sizeof UNKNOWN - 1) + sizeof where];

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void *checked(void *memory) {
    if (!memory) die("memory");
    return memory;
}

static void count(int change) {
    clients += change;
    who_size = sprintf(who, "%ld\n", clients);
}

static void watch(struct client *client, int operation, unsigned events) {
    struct epoll_event event = {.events = events, .data.ptr = client};
    if (epoll_ctl(epoll, operation, client->fd, &event)) die("epoll_ctl");
}

static void let_go(struct client *client) {
    close(client->fd);
    free(client->rest);
    free(client->pending);
    free(client);
    count(-1);
}

static void accept_all(int listener) {
    int fd, on = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        struct client *client = checked(calloc(1, sizeof *client));
        client->fd = fd;
        watch(client, EPOLL_CTL_ADD, EPOLLIN);
        count(1);
    }
    if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) die("accept4");
}

static char *answer(char *reply, const char *line, size_t size) {
    commands++;
    if (size == 3 && !memcmp(line, "WHO", 3)) return mempcpy(reply, who, who_size);
    if (size == 3 && !memcmp(line, "WHY", 3)) return mempcpy(reply, "42\n", 3);
    if (size == 5 && !memcmp(line, "WHERE", 5)) return mempcpy(reply, where, 37);
    return mempcpy(reply, UNKNOWN, sizeof UNKNOWN - 1);
}

static void keep(struct client *client, const char *data, size_t size) {
    client->rest = checked(realloc(client->rest, client->rest_size + size));
    memcpy(client->rest + client->rest_size, data, size);
    client->rest_size += size;
}

/* Send what the kernel accepts, and keep the rest. */
static void send_or_keep(struct client *client, const char *data, size_t size) {
    ssize_t sent = send(client->fd, data, size, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN && errno != EINTR) return let_go(client);
    size_t left = sent < 0 ? size : size - sent;
    if (left && !client->pending) {
        client->pending = checked(malloc(left));
        watch(client, EPOLL_CTL_MOD, EPOLLOUT);
    } else if (!left && client->pending) {
        free(client->pending);
        client->pending = NULL;
        watch(client, EPOLL_CTL_MOD, EPOLLIN);
    }
    if (left) memmove(client->pending, data + size - left, left);
    client->pending_size = left;
}

static void receive(struct client *client) {
    ssize_t size = recv(client->fd, received, sizeof received, 0);
    if (size < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (size <= 0) return let_go(client);
    char *line = received, *end = received + size, *reply = replies, *newline;
    while ((newline = memchr(line, '\n', end - line))) {
        if (client->rest) {
            keep(client, line, newline - line);
            reply = answer(reply, client->rest, client->rest_size);
            free(client->rest);
            client->rest = NULL;
            client->rest_size = 0;
        } else {
            reply = answer(reply, line, newline - line);
        }
        line = newline + 1;
    }
    if (line < end) keep(client, line, end - line);
    if (reply > replies) send_or_keep(client, replies, reply - replies);
}

int main(int argc, char **argv) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct epoll_event events[512], event = {.events = EPOLLIN};
    int on = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    FILE *uuid = fopen("/proc/sys/kernel/random/uuid", "r");
    if (argc != 2 || !uuid || !fgets(where, sizeof where, uuid)) die("epoll PORT");
    fclose(uuid);
    address.sin_port = htons(atoi(argv[1]));
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1024)) die("listen");
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event)) die("epoll_ctl");
    puts("ready");
    fflush(stdout);
    for (;;) {
        int ready = epoll_wait(epoll, events, sizeof events / sizeof *events, -1);
        for (int i = 0; i < ready; i++) {
            struct client *client = events[i].data.ptr;
            if (!client) accept_all(listener);
            else if (client->pending) send_or_keep(client, client->pending, client->pending_size);
            else receive(client);
        }
    }
}
